"""Labels pictures with a trained model.

python -m clip_jax.predict --model=ViT-B-32.pt --labels="a cat,a dog" photo.jpg [...]
"""

import argparse
import json
import sys

import absl.logging

from clip_jax.models.presets import ACTIVATIONS
from clip_jax.standard_output import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clip_jax.predict", description="Labels pictures by names.")
    parser.add_argument("--model", required=True, help="a run, or weights of OpenAI, open_clip or Hugging Face")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of a file that cannot tell; else quick_gelu")
    parser.add_argument("--labels", required=True, help="names to choose among, separated by commas")
    parser.add_argument("--template", default="{}", help='a sentence around each name, such as "an emoji of {}"')
    parser.add_argument("--top", type=int, default=3, help="how many labels to print for a picture")
    parser.add_argument("--json", action="store_true", help="print all probabilities as JSON instead of a table")
    parser.add_argument("pictures", nargs="+")
    arguments = parser.parse_args(argv)
    labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    from clip_jax.loading import load
    from clip_jax.training.checkpoint import CheckpointError

    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax warns of every option that follows from another
    try:
        if not labels:
            raise ValueError("--labels names nothing to choose among")
        if arguments.top < 1:
            raise ValueError(f"--top={arguments.top} must be at least 1")
        if "{}" not in arguments.template:
            raise ValueError(f"--template={arguments.template} has no {{}} for the name")
        if len(set(labels)) < len(labels):
            raise ValueError("--labels names something twice")
        model = load(arguments.model, activation=arguments.activation)
        probabilities = model.classify(arguments.pictures, labels, [arguments.template])
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        rows = [dict(zip(labels, map(float, row), strict=True)) for row in probabilities]
        print(json.dumps(dict(zip(arguments.pictures, rows, strict=True)), indent=2, ensure_ascii=False))
        return 0
    width = max(map(len, arguments.pictures))
    for picture, row in zip(arguments.pictures, probabilities, strict=True):
        best = (-row).argsort()[: arguments.top]
        print(f"{picture:{width}}  " + "  ".join(f"{labels[index]} {row[index]:.1%}" for index in best))
    return 0


if __name__ == "__main__":
    run(main)
