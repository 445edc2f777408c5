"""Converts weights between this project, open_clip, Hugging Face and OpenAI's program.

    python -m clip_jax.convert runs/vit_l14 vit_l14_hf --to=huggingface
    python -m clip_jax.convert ViT-B-32.pt vit_b32

Exit codes: 0 written, 2 a mistake in what was asked for (one line).
"""

import argparse
import sys

import absl.logging

from clip_jax.models.presets import ACTIVATIONS
from clip_jax.standard_output import run

USES = {
    "clip_jax": 'clip_jax.load("{path}")',
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{path}")',
    "open_clip file": 'open_clip.create_model_and_transforms({name}, pretrained="{path}")',
    "huggingface": 'transformers.CLIPModel.from_pretrained("{path}")',
    "openai": 'clip.load("{path}")',
}


def open_clip_name(name: str) -> str:
    """What open_clip calls a preset, quoted; NAME where it has no config of that architecture yet."""
    if name == "custom":
        return "NAME"
    plain, with_gelu, _ = name.partition(" with gelu")
    return f'"{plain.replace("/", "-").replace("@", "-")}{"" if with_gelu else "-quickgelu"}"'


def main(argv: list[str] | None = None) -> int:
    formats = ("clip_jax", "open_clip", "huggingface", "openai")
    parser = argparse.ArgumentParser(prog="python -m clip_jax.convert", description="Converts weights.")
    parser.add_argument("source", help="a run, a file of weights, or a folder of weights and their config")
    parser.add_argument("destination", help="a new folder; a new .safetensors file for open_clip, .pt for openai")
    parser.add_argument("--to", choices=formats, default="clip_jax", help="the program to write for (clip_jax)")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="for a source that cannot tell; else quick_gelu")
    arguments = parser.parse_args(argv)

    import jax

    from clip_jax.training.checkpoint import CheckpointError
    from clip_jax.weights import preset_name, read_weights, write_weights

    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax warns of every option that follows from another
    try:
        weights = read_weights(arguments.source, arguments.activation)
        if weights.note:
            print(f"note: {weights.note}", file=sys.stderr)
        write_weights(weights, arguments.destination, arguments.to)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"]))
    single_file = arguments.to == "open_clip" and arguments.destination.endswith(".safetensors")
    name = preset_name(weights.preset)
    use = USES["open_clip file" if single_file else arguments.to].format(
        path=arguments.destination, name=open_clip_name(name)
    )
    print(f"{name}, {parameters:,} parameters, from {weights.format} to {arguments.destination}")
    print(f"Use it:  {use}")
    return 0


if __name__ == "__main__":
    run(main)
