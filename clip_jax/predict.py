"""Labels images with a trained model.

    python -m clip_jax.predict --model=ViT-B-32.pt --labels="a cat,a dog" photo.jpg
    python -m clip_jax.predict --model=ViT-B-32.pt --labels=@labels.txt photos/ "more/**/*.png" --json

Exit codes: 0 every image is labeled; 1 some images cannot be used: each is reported on stderr, and the others are
labeled; 1 as well for a failure, such as a full disk; 2 no image can be used, or a flag is wrong; 3 interrupted.
"""

import argparse
import collections
import json
import pathlib

import numpy as np

from clip_jax.command_line import DONE, FAILED, MISTAKE, Parser, command, report, run, set_up_logging
from clip_jax.data.image_files import find_image_files
from clip_jax.data.images import MAX_ASPECT_RATIO, MAX_PIXELS
from clip_jax.errors import printable, reason
from clip_jax.models.activations import ACTIVATIONS

PROGRAM = "python -m clip_jax.predict"
SHOWN = 3  # names that a line lists
HINTS = {"too_large": "--max-pixels", "extreme_aspect_ratio": "--max-aspect-ratio"}


def parse_arguments(argv: list[str], program: str = PROGRAM) -> argparse.Namespace:
    """Reads the flags. Raises ValueError if one is missing, unknown or has a wrong value; one line."""
    parser = Parser(prog=program, description="Labels images.")
    parser.add_argument("--model", required=True, help="a run, or weights of OpenAI, open_clip or Hugging Face")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="if a file does not state it (default quick_gelu)")
    parser.add_argument(
        "--labels",
        required=True,
        metavar="LABELS",
        help="labels to choose from, separated by commas, or @FILE: a text file with one label on each line",
    )
    parser.add_argument("--template", default="{}", help='a sentence around each label, such as "an emoji of {}"')
    parser.add_argument("--top", type=int, default=3, help="how many labels to print for an image (%(default)s)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the probabilities of all labels as JSON: {image: {label: probability}}",
    )
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are refused (%(default)s)")
    parser.add_argument(
        "--max-aspect-ratio",
        type=float,
        default=MAX_ASPECT_RATIO,
        help="images with a larger ratio of the long to the short side are refused (%(default)s)",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file; a folder, with its subfolders; or a quoted pattern, where ** matches any number of folders",
    )
    arguments = parser.read(argv)
    for name, least in (("top", 1), ("max_pixels", 1), ("max_aspect_ratio", 1.0)):
        value = getattr(arguments, name)
        if not value >= least:  # refuses NaN too
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least {least:g}")
    if "{}" not in arguments.template:
        raise ValueError(f"--template={arguments.template} has no {{}} for the label")
    return arguments


def read_labels(text: str) -> tuple[list[str], list[str]]:
    """Returns the labels of ``--labels``, each once, and the labels that occur more than once.

    Raises:
      ValueError: there are no labels, or their file cannot be read or is not UTF-8.
    """
    names = text.split(",")
    if text.startswith("@"):
        file = pathlib.Path(text[1:]).expanduser()
        try:
            # Not splitlines(), which also splits at characters that a label may have, such as U+2028.
            names = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"--labels={text}: not UTF-8: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise ValueError(f"--labels={text}: {error.strerror}") from None
    names = [name.strip() for name in names if name.strip()]
    labels = list(dict.fromkeys(names))
    if not labels:
        raise ValueError(f"--labels={text} has no labels")
    counts = collections.Counter(names)
    return labels, [label for label in labels if counts[label] > 1]


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    arguments = parse_arguments(argv, program)
    set_up_logging()
    labels, repeated = read_labels(arguments.labels)
    if repeated:
        report("note", f"--labels repeats {_listed(repeated)}; each counts once")
    found = find_image_files(arguments.images)
    for problem in found.problems:
        report("error", printable(problem))
    if not found.paths:
        if not found.problems:
            raise ValueError(f"there are no images among {_listed(found.skipped)}")
        return MISTAKE
    if found.skipped:
        kind = "file that is not an image" if len(found.skipped) == 1 else "files that are not images"
        report("note", f"passed over {len(found.skipped):,} {kind}: {_listed(found.skipped)}")
    from PIL import Image

    from clip_jax.loading import load
    from clip_jax.run_folder import CheckpointError

    # Pillow itself refuses images of more than twice this limit.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, arguments.max_pixels)
    try:
        model = load(arguments.model, activation=arguments.activation)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    model.max_pixels, model.max_aspect_ratio = arguments.max_pixels, arguments.max_aspect_ratio
    length = model.preset.text.context_length
    if too_long := _too_long(labels, arguments.template, length):
        report("note", f"labels longer than the model's {length} tokens are cut: {_listed(too_long)}")
    good, failed = 0, len(found.problems)
    write = _JsonWriter(labels) if arguments.json else _TableWriter(labels, arguments.top, found.paths)
    answers = model.classify_each(found.paths, labels, [arguments.template])
    for path, answer in zip(found.paths, answers, strict=True):
        if isinstance(answer, Exception):
            report("error", printable(_reason(answer)))
            failed += 1
        else:
            write.answer(path, answer)
            good += 1
    write.end()
    return MISTAKE if not good else FAILED if failed else DONE


def _too_long(labels: list[str], template: str, context_length: int) -> list[str]:
    """Returns the labels that are longer than the model's context."""
    from clip_jax.data.tokenizer import tokenize

    found = []
    for label in labels:
        try:
            tokenize(template.replace("{}", label), context_length)
        except ValueError:
            found.append(label)
    return found


class _TableWriter:
    """Prints one line for each image: its best labels with their probabilities."""

    def __init__(self, labels: list[str], top: int, paths: list[str]):
        self._labels, self._top = labels, top
        self._width = max(len(printable(path)) for path in paths)

    def answer(self, path: str, row: np.ndarray) -> None:
        best = (-row).argsort(kind="stable")[: self._top]
        answers = "  ".join(f"{self._labels[index]} {row[index]:.1%}" for index in best)
        print(f"{printable(path):{self._width}}  {printable(answers)}", flush=True)

    def end(self) -> None:
        pass


class _JsonWriter:
    """Prints ``{path: {label: probability}}``, one image at a time. A repeated path is printed once."""

    def __init__(self, labels: list[str]):
        self._labels, self._written, self._held = labels, set(), ""

    def answer(self, path: str, row: np.ndarray) -> None:
        if path in self._written:
            return
        print(f"{self._held}," if self._written else "{", flush=True)
        content = json.dumps(dict(zip(self._labels, map(float, row), strict=True)), ensure_ascii=False)
        # Escapes a path that is not valid UTF-8, which cannot be printed.
        self._held = f"  {json.dumps(path, ensure_ascii=not path.isprintable())}: {content}"
        self._written.add(path)

    def end(self) -> None:
        print(f"{self._held}\n}}" if self._written else "{}", flush=True)


def _reason(error: Exception) -> str:
    """Returns why an image cannot be used, starting with the file's name, and the flag that would allow it."""
    hint = HINTS.get(getattr(error, "reason", ""))
    return f"{reason(error).rstrip('.')}; {hint} allows more" if hint else reason(error)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


if __name__ == "__main__":
    run(main)
