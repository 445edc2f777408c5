"""Prepares pairs of images and captions for training: inspects them, converts them, measures how fast they are read.

    python -m clip_jax.prepare inspect csv:/pairs.csv --sheet=pairs.html
    python -m clip_jax.prepare convert csv:/pairs.csv /data/pairs --image-size=256
    python -m clip_jax.prepare bench "array_record:/data/pairs/pairs-*" --config=configs/vit_l14.py

Exit codes: 0 done, 1 failed, 2 a mistake in the command (each with one line), 3 interrupted. What ``convert`` and
``openclipart`` have written stays, however they end: the same command continues from there.
"""

import argparse
import datetime
import math
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from clip_jax.command_line import DONE, Parser, command, is_mistake, read_config, run, set_up_logging
from clip_jax.errors import FailedError, reason

if TYPE_CHECKING:
    from clip_jax.data.sources import Source

PROGRAM = "python -m clip_jax.prepare"
CONTINUES = "the same command continues from here"
BATCH_SIZE = 64  # the rate hardly depends on it, and a pod's batch would take minutes
LINE_EVERY = 10.0  # seconds between two progress lines when the output is not a terminal


def parse_arguments(argv: list[str], program: str = PROGRAM) -> argparse.Namespace:
    """Parses the command line. Raises ValueError if a flag is missing or unknown, or its value is wrong."""
    from clip_jax.data.openclipart import PARTS

    parser = Parser(prog=program, description="Prepares pairs for training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, purpose: str) -> Parser:
        subcommand = commands.add_parser(name, help=purpose, description=purpose)
        subcommand.set_defaults(run=run)
        return subcommand

    convert = add("convert", _convert, "Writes any source as ArrayRecord shards for training.")
    _add_source(convert)
    _add_output(convert)
    convert.add_argument("--license", default="", metavar="TEXT", help="license of the pairs, stored in the manifest")

    clipart = add(
        "openclipart", _openclipart, "Writes the drawings of Debian's openclipart-png and openclipart-svg as shards."
    )
    clipart.add_argument("png", type=pathlib.Path, metavar="PNG_FOLDER", help="such as /usr/share/openclipart/png")
    clipart.add_argument("svg", type=pathlib.Path, metavar="SVG_FOLDER", help="such as /usr/share/openclipart/svg")
    clipart.add_argument(
        "--part", choices=PARTS, default="all", help="held_out: a tenth of the names; train: the others"
    )
    _add_output(clipart)

    inspect = add("inspect", _inspect, "Reports what a source holds and which of its records are bad.")
    _add_source(inspect)
    inspect.add_argument(
        "--samples", type=_positive, default=2_000, metavar="N", help="number of records to read (2,000)"
    )
    inspect.add_argument(
        "--max-bad-share",
        type=_share,
        default=0.1,
        metavar="X",
        help="fail (exit code 1) if a larger share is bad (0.1)",
    )
    inspect.add_argument("--sheet", type=pathlib.Path, metavar="FILE.html", help="write a page of images and captions")

    bench = add("bench", _bench, "Measures how many images per second this host feeds to training.")
    _add_source(bench)
    bench.add_config("configs/vit_l14.py")
    bench.add_argument("--pairs-per-second", type=_rate, metavar="X", help="training speed of the whole pod")

    return parser.read(argv)


def _add_source(subcommand: Parser) -> None:
    subcommand.add_argument("source", metavar="SOURCE", help="such as folder:/images or csv:/pairs.csv")


def _add_output(subcommand: Parser) -> None:
    from clip_jax.data.records import Settings

    subcommand.add_argument("output", type=pathlib.Path, metavar="OUTPUT", help="folder: new, or one to continue")
    subcommand.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help="scale larger images to this short side, in pixels, as JPEG; by default no image is changed",
    )
    subcommand.add_argument("--quality", type=_quality, default=Settings.quality, help="quality of these JPEGs (92)")
    subcommand.add_argument(
        "--pairs-per-shard", type=_positive, default=Settings.pairs_per_shard, metavar="N", help="(10,000)"
    )
    subcommand.add_argument("--workers", type=_positive, metavar="N", help="number of processes (number of cores)")


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def _quality(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text} must be in [1, 100]")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1]")
    return share


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return rate


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    arguments = parse_arguments(argv, program)
    set_up_logging()
    arguments.run(arguments)
    return DONE


class ProgressLine:
    """Prints ``1,200 of 5,000 pairs  24%  410 pairs/s  0:00:09 left``.

    On a terminal it overwrites one line. Elsewhere it prints a new line every ten seconds.
    """

    def __init__(self, stream):
        self._stream, self._in_place = stream, stream.isatty()
        self._total = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self._total:
            self._total, self._start, self._printed = total, now, now
        finished = done == total
        if not done or not (finished or self._in_place or now > self._printed + LINE_EVERY):
            return
        self._printed = now
        rate = done / max(now - self._start, 1e-3)
        left = datetime.timedelta(seconds=round((total - done) / rate))
        line = f"{done:,} of {total:,} pairs  {done / total:.0%}  {rate:,.0f} pairs/s  {left} left"
        start, end = ("\r\x1b[K", "\n" if finished else "") if self._in_place else ("", "\n")
        print(f"{start}{line}", end=end, file=self._stream, flush=True)


def _convert(arguments: argparse.Namespace) -> None:
    from clip_jax.data.sources import open_source

    _write(open_source(arguments.source), arguments.source, arguments, arguments.license)


def _openclipart(arguments: argparse.Namespace) -> None:
    from clip_jax.data import openclipart

    source = openclipart.OpenClipart(arguments.png, arguments.svg, arguments.part)
    _write(source, openclipart.SOURCE_NAME, arguments, openclipart.LICENSE)


def _write(source: "Source", name: str, arguments: argparse.Namespace, license_text: str) -> None:
    from clip_jax.data import inspection
    from clip_jax.data.records import Settings, write_records

    settings = Settings(arguments.pairs_per_shard, arguments.image_size or 0, arguments.quality, license_text)
    workers = arguments.workers or inspection.cores()
    try:
        manifest = write_records(source, name, arguments.output, settings, workers, ProgressLine(sys.stderr))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(CONTINUES) from None
    except OSError as error:
        if isinstance(error, FailedError) or is_mistake(error):
            raise
        raise FailedError(f"{reason(error)}; {CONTINUES}") from None
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{manifest['pairs']:,} pairs, {manifest['captions']:,} captions, {size / 1e6:,.1f} MB in "
        f"{len(manifest['shards']):,} shards below {arguments.output}"
    )
    if manifest["merged"]:
        print(f"merged: {manifest['merged']:,} records that repeat an image, whose captions its first record now has")
    if manifest["bad_samples"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["bad_samples"].items())
        print(f"left out: {reasons} (listed in {arguments.output / 'bad_samples.jsonl'})")
    print(f'Train on them:  --config.data.source="array_record:{arguments.output}/pairs-*"')


def _inspect(arguments: argparse.Namespace) -> None:
    from clip_jax.data import inspection
    from clip_jax.data.bad_samples import TooManyBadSamplesError
    from clip_jax.data.sources import open_source

    facts = inspection.inspect_source(open_source(arguments.source), arguments.samples)
    if arguments.sheet:
        arguments.sheet.write_text(inspection.contact_sheet(arguments.source, facts), encoding="utf-8")
    print("\n".join(inspection.format_facts(facts)))
    if arguments.sheet:
        print(f"\n{len(facts.samples)} images and their captions are in {arguments.sheet}")
    if facts.bad_share > arguments.max_bad_share:
        raise TooManyBadSamplesError(
            f"{facts.bad.total():,} of the {facts.looked_at:,} records that were read are bad, more than "
            f"--max-bad-share={arguments.max_bad_share:g} allows"
        )


def _bench(arguments: argparse.Namespace) -> None:
    from clip_jax.config import validate
    from clip_jax.data import inspection
    from clip_jax.data.decoded_cache import DecodedCache
    from clip_jax.data.pipeline import Batches, LoadPair, Workers, transform_of
    from clip_jax.data.sources import open_mixture
    from clip_jax.data.sources.buckets import access_of, use_access
    from clip_jax.models.presets import model_preset

    config = read_config(arguments)
    config.data.source = arguments.source
    validate(config)
    data = config.data
    use_access(access_of(data))
    mixture = open_mixture(data.source, data.weights)
    cache = DecodedCache(config.data.cache_mebibytes)
    load_pair = LoadPair(mixture, transform_of(data, model_preset(config), config.model.vision.image_size), cache)
    batches = Batches(load_pair, BATCH_SIZE, config.seed, workers=Workers(data.num_workers, data.num_threads))
    try:
        feed = inspection.measure_feed_speed(batches)
    finally:
        batches.close()
    images = f"images/s of {config.model.vision.image_size} x {config.model.vision.image_size}"
    workers = f"{data.num_workers} workers of {data.num_threads} threads each"
    print(f"{feed.images_per_second:,.0f} {images} on {feed.cores} cores with {workers}")
    if feed.images_per_cpu_second:
        print(f"{feed.images_per_cpu_second:,.0f} images per CPU second")
    if arguments.pairs_per_second:
        hosts = feed.hosts_for(arguments.pairs_per_second)
        print(
            f"{arguments.pairs_per_second:,.0f} pairs/s need {hosts:,} hosts with {feed.cores} cores each, "
            "if nothing else slows them down"
        )


if __name__ == "__main__":
    run(main)
