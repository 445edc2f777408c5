"""Prepares pairs for training: looks at them, writes them as shards, and measures how fast they can be read.

    python -m clip_jax.prepare inspect csv:/pairs.csv --sheet=pairs.html
    python -m clip_jax.prepare convert csv:/pairs.csv /data/pairs --image-size=256
    python -m clip_jax.prepare bench "array_record:/data/pairs/pairs-*" --config=configs/vit_l14.py

Exit codes: 0 done, 1 failed, 2 a mistake in what was asked for (one line each), 3 interrupted. What ``convert`` and
``openclipart`` have written stays, however they end: the same command goes on with it.
"""

import argparse
import datetime
import errno
import math
import pathlib
import sys
import time

from clip_jax.data import inspection, openclipart
from clip_jax.data.bad_samples import TooManyBadSamplesError
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.pipeline import Batches, InputError, LoadPair, transform_of
from clip_jax.data.records import Settings, WriteError, write_records
from clip_jax.data.sources import ShardError, Source, open_mixture, open_source
from clip_jax.data.sources.buckets import access_of, use_access
from clip_jax.standard_output import run

BATCH_SIZE = 64  # of the measured pipeline: the rate hardly depends on it, and a pod's batch would take minutes
LINE_EVERY = 10.0  # seconds between two lines of progress where there is no terminal
MISTAKES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class ParserError(ValueError):
    """Flags that cannot be read."""


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str):
        raise ParserError(f"{message}; see {self.prog} --help")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and those that ``bench`` hands on to the config.

    Raises:
      ValueError: a flag is missing or unknown, or its value is wrong.
    """
    parser = Parser(prog="python -m clip_jax.prepare", description="Prepares pairs for training.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, purpose: str) -> Parser:
        command = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    def add_source(command: Parser) -> None:
        command.add_argument("source", metavar="SOURCE", help="such as folder:/pictures or csv:/pairs.csv")

    def add_output(command: Parser) -> None:
        command.add_argument("output", type=pathlib.Path, metavar="OUTPUT", help="a folder: new, or to go on with")
        command.add_argument(
            "--image-size",
            type=_positive,
            metavar="N",
            help="scale larger pictures to this short side, as JPEG; without it pictures stay as they are",
        )
        command.add_argument("--quality", type=_quality, default=Settings.quality, help="of these JPEGs (92)")
        command.add_argument(
            "--pairs-per-shard", type=_positive, default=Settings.pairs_per_shard, metavar="N", help="(10,000)"
        )
        command.add_argument("--workers", type=_positive, metavar="N", help="processes (as many as there are cores)")

    convert = add("convert", _convert, "Writes any source as ArrayRecord shards that training reads.")
    add_source(convert)
    add_output(convert)
    convert.add_argument("--licence", default="", metavar="TEXT", help="of the pairs, for the manifest")

    clipart = add(
        "openclipart", _openclipart, "Writes the drawings of Debian's openclipart-png and openclipart-svg as shards."
    )
    clipart.add_argument("png", type=pathlib.Path, metavar="PNG_FOLDER", help="such as /usr/share/openclipart/png")
    clipart.add_argument("svg", type=pathlib.Path, metavar="SVG_FOLDER", help="such as /usr/share/openclipart/svg")
    clipart.add_argument(
        "--part", choices=openclipart.PARTS, default="all", help="held_out: a tenth of the names, train: the others"
    )
    add_output(clipart)

    inspect = add("inspect", _inspect, "Tells what a source holds, and how much of it is bad.")
    add_source(inspect)
    inspect.add_argument("--samples", type=_positive, default=2_000, metavar="N", help="records to look at (2,000)")
    inspect.add_argument(
        "--max-bad-share", type=_share, default=0.1, metavar="X", help="with more bad ones it fails, exit code 1 (0.1)"
    )
    inspect.add_argument("--sheet", type=pathlib.Path, metavar="FILE.html", help="a page of pictures and captions")

    bench = add("bench", _bench, "Measures how fast this host feeds a training; takes --config.NAME=VALUE as well.")
    add_source(bench)
    bench.add_argument("--config", required=True, metavar="FILE", help="such as configs/vit_l14.py")
    bench.add_argument("--pairs-per-second", type=_rate, metavar="X", help="that the whole pod trains on")

    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not _bench:
        raise ParserError(f"unknown argument {rest[0]}; see python -m clip_jax.prepare --help")
    return arguments, rest


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


def main(argv: list[str] | None = None) -> int:
    try:
        arguments, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
        arguments.run(arguments, rest)
    except (WriteError, InputError, ShardError, TooManyBadSamplesError) as error:
        return _say("failed", str(error), 1)
    except OSError as error:
        line = str(error)
        if error.strerror:
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in MISTAKES or not error.strerror:
            return _say("error", line, 2)
        return _say("failed", f"{line}; the same command goes on from here", 1)
    except ValueError as error:
        return _say("error", str(error), 2)
    except KeyboardInterrupt:
        return _say("\ninterrupted", "the same command goes on from here", 3)
    return 0


def _say(kind: str, text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"{kind}: {line}", file=sys.stderr)
    return code


class ProgressLine:
    """``1,200 of 5,000 pairs  24%  410 pairs/s  0:00:09 left``: one line that changes, or now and then a new one."""

    def __init__(self, stream):
        self._stream, self._in_place = stream, stream.isatty()
        self._total = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self._total:
            self._total, self._start, self._told = total, now, now
        finished = done == total
        if not done or not (finished or self._in_place or now > self._told + LINE_EVERY):
            return
        self._told = now
        rate = done / max(now - self._start, 1e-3)
        left = datetime.timedelta(seconds=round((total - done) / rate))
        line = f"{done:,} of {total:,} pairs  {done / total:.0%}  {rate:,.0f} pairs/s  {left} left"
        start, end = ("\r\x1b[K", "\n" if finished else "") if self._in_place else ("", "\n")
        print(f"{start}{line}", end=end, file=self._stream, flush=True)


def _convert(arguments: argparse.Namespace, rest: list[str]) -> None:
    _write(open_source(arguments.source), arguments.source, arguments, arguments.licence)


def _openclipart(arguments: argparse.Namespace, rest: list[str]) -> None:
    source = openclipart.OpenClipart(arguments.png, arguments.svg, arguments.part)
    _write(source, openclipart.SOURCE_NAME, arguments, openclipart.LICENCE)


def _write(source: Source, name: str, arguments: argparse.Namespace, licence: str) -> None:
    settings = Settings(arguments.pairs_per_shard, arguments.image_size or 0, arguments.quality, licence)
    workers = arguments.workers or inspection.cores()
    manifest = write_records(source, name, arguments.output, settings, workers, ProgressLine(sys.stderr))
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{manifest['pairs']:,} pairs, {manifest['captions']:,} captions, {size / 1e6:,.1f} MB in "
        f"{len(manifest['shards']):,} shards below {arguments.output}"
    )
    if manifest["merged"]:
        print(f"merged: {manifest['merged']:,} records of pictures that had come before gave them their captions")
    if manifest["bad_samples"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["bad_samples"].items())
        print(f"left out: {reasons} (listed in {arguments.output / 'bad_samples.jsonl'})")
    print(f'Train on them:  --config.data.source="array_record:{arguments.output}/pairs-*"')


def _inspect(arguments: argparse.Namespace, rest: list[str]) -> None:
    facts = inspection.inspect_source(open_source(arguments.source), arguments.samples)
    if arguments.sheet:
        arguments.sheet.write_text(inspection.contact_sheet(arguments.source, facts), encoding="utf-8")
    print("\n".join(inspection.format_facts(facts)))
    if arguments.sheet:
        print(f"\n{len(facts.samples)} pictures and their captions are in {arguments.sheet}")
    if facts.bad_share > arguments.max_bad_share:
        raise TooManyBadSamplesError(
            f"{facts.bad.total():,} of the {facts.looked_at:,} records that were looked at are bad, more than "
            f"--max-bad-share={arguments.max_bad_share:g} allows"
        )


def _bench(arguments: argparse.Namespace, rest: list[str]) -> None:
    # Only here: the workers that read import this module anew, and need neither optimizer nor checkpoints.
    from clip_jax import main as training
    from clip_jax.config import validate
    from clip_jax.models.presets import model_preset

    config, _, _ = training.parse_arguments([f"--config={arguments.config}", *rest])
    config.data.source = arguments.source
    validate(config)
    data = config.data
    use_access(access_of(data))
    mixture = open_mixture(data.source, data.weights)
    cache = DecodedCache(config.data.cache_mebibytes)
    load_pair = LoadPair(mixture, transform_of(data, model_preset(config), config.model.vision.image_size), cache)
    batches = Batches(load_pair, BATCH_SIZE, config.seed, num_workers=data.num_workers, num_threads=data.num_threads)
    try:
        feed = inspection.measure_feed(batches)
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
