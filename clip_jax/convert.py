"""Converts weights between this project, open_clip, Hugging Face and OpenAI's program.

    python -m clip_jax.convert runs/vit_l14 vit_l14_hf --to=huggingface
    python -m clip_jax.convert ViT-B-32.pt vit_b32

Exit codes: 0 written, 1 failed, 2 a mistake in the command (one line each), 3 interrupted.
"""

import argparse
import dataclasses
import json
import os
import shlex

from clip_jax.command_line import DONE, Parser, command, report, run, set_up_logging
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.preprocessing import Preprocessing

PROGRAM = "python -m clip_jax.convert"
USES = {
    "clip_jax": 'clip_jax.load("{path}")',
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{path}")',
    "huggingface": 'transformers.CLIPModel.from_pretrained("{path}")',
    "openai": 'clip.load("{path}")',
}


def open_clip_arguments(name: str) -> str | None:
    """The name of a preset (:func:`clip_jax.weights.preset_name`) as arguments of ``open_clip.create_model``.

    None if open_clip 3.3 has no config of that architecture: it can then only load a folder, which has a config.
    """
    plain, with_gelu, _ = name.partition(" with gelu")
    if plain in ("custom", "ViT-tiny"):
        return None
    theirs = plain.replace("/", "-").replace("@", "-")
    if plain == "ViT-S/16":  # open_clip has one config for both activations
        return json.dumps(theirs) + ("" if with_gelu else ", force_quick_gelu=True")
    return json.dumps(theirs if with_gelu else f"{theirs}-quickgelu")


def loading_example(name: str, params: dict, preprocessing: Preprocessing, destination: str, to: str) -> str:
    """One line that shows how to load the model that was written."""
    path = json.dumps(destination, ensure_ascii=False)[1:-1]  # the quotes are added where it is used
    if not (to == "open_clip" and destination.endswith(".safetensors")):
        return USES[to].format(path=path)
    arguments = open_clip_arguments(name)
    if arguments is None or preprocessing.fill_color:  # create_model_and_transforms cannot set it
        paths = shlex.join([destination, destination.removesuffix(".safetensors")])
        lacks = "name for it" if arguments is None else "argument for the color of its padding"
        return f"open_clip has no {lacks} and needs a folder: python -m clip_jax.convert {paths} --to=open_clip"
    from clip_jax.weights.open_clip import constructor_arguments

    arguments += "".join(f", {key}={value:g}" for key, value in constructor_arguments(params).items())
    for field in dataclasses.fields(preprocessing):
        if (value := getattr(preprocessing, field.name)) != field.default:
            arguments += f", image_{field.name}={json.dumps(value) if isinstance(value, str) else value}"
    return f'open_clip.create_model_and_transforms({arguments}, pretrained="{path}")'


def parse_arguments(argv: list[str], program: str = PROGRAM) -> argparse.Namespace:
    """Returns the flags.

    Raises:
      ValueError: a flag is missing or unknown, or its value is wrong; one line.
    """
    parser = Parser(prog=program, description="Converts weights.")
    parser.add_argument(
        "source", type=os.path.expanduser, help="a run, a file of weights, or a folder of weights and their config"
    )
    parser.add_argument(
        "destination",
        type=os.path.expanduser,
        help="a new folder; a new .safetensors file for open_clip, .pt for openai",
    )
    parser.add_argument("--to", choices=USES, default="clip_jax", help="the program to write for (clip_jax)")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="for a source that cannot tell; else quick_gelu")
    return parser.read(argv)


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    arguments = parse_arguments(argv, program)
    import jax

    from clip_jax.run_folder import CheckpointError
    from clip_jax.weights import preset_name, read_weights, write_weights

    set_up_logging()
    try:
        weights = read_weights(arguments.source, arguments.activation)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    if weights.note:
        report("note", weights.note)
    write_weights(weights, arguments.destination, arguments.to)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"]))
    name, params = preset_name(weights.preset), weights.variables["params"]
    use = loading_example(name, params, weights.preset.preprocessing, arguments.destination, arguments.to)
    print(f"{name}, {parameters:,} parameters, from {weights.format} to {arguments.destination}")
    print(f"Use it:  {use}")
    return DONE


if __name__ == "__main__":
    run(main)
