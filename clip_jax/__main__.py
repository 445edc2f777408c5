"""``clip-jax COMMAND``, or ``python -m clip_jax COMMAND``: starts one of the commands."""

import argparse
import difflib
import functools
import importlib

from clip_jax.command_line import Parser, command, run

COMMANDS = {
    "train": ("clip_jax.main", "train a model"),
    "predict": ("clip_jax.predict", "label images with a model"),
    "evaluate": ("clip_jax.evaluate", "score a model: zero-shot classification, retrieval, linear probes"),
    "convert": ("clip_jax.convert", "convert weights from and to OpenAI's, open_clip's and Hugging Face's formats"),
    "plan": ("clip_jax.plan", "compile a training for a TPU slice that isn't here: memory, step time, cost"),
    "verify": ("clip_jax.verify", "check the checkpoints of a run against their digests"),
    "prepare": ("clip_jax.prepare", "look at pairs, write them as shards, measure how fast they can be read"),
}


@command("clip-jax")
def main(argv: list[str], program: str) -> int:
    name = argv[0] if argv else ""
    if name in COMMANDS:
        module, _ = COMMANDS[name]
        return importlib.import_module(module).main(argv[1:], f"{program} {name}")
    commands = "\n".join(f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = Parser(
        prog=program,
        usage="%(prog)s COMMAND ...",
        description="Trains, evaluates and uses CLIP models.",
        epilog=f"commands:\n{commands}\n\n{program} COMMAND --help shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name.startswith("-"):
        parser.read(argv[:1])
    if not name:
        parser.error(f"no command is given; the commands are {', '.join(COMMANDS)}")
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    parser.error(f"unknown command {name}; {hint}")


def start() -> None:
    """The console script ``clip-jax``."""
    run(main)


if __name__ == "__main__":
    run(functools.partial(main, program="python -m clip_jax"))
