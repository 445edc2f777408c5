"""Inspects a source before training: what it holds, which records are bad, and how fast this host can read it."""

import base64
import dataclasses
import html
import io
import json
import math
import multiprocessing
import os
import pathlib
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.pipeline import reason_of
from clip_jax.data.sources import ShardError, Source
from clip_jax.data.tokenizer import tokenize

CONTEXT_LENGTH = 77  # of every model that OpenAI published
LONGEST_CAPTION = 4_096  # tokens; longer captions count as this long
SHEET_IMAGES = 120
SHEET_SIDE = 256  # px, long side of an image on the sheet
CAPTIONS_SHOWN = 3  # per image on the sheet; the others are folded
PRINTED_SAMPLES = 10
BAD_EXAMPLES = 3  # per reason
BAD_LENGTH = 400  # characters per example
PERCENTILES = (0, 5, 50, 95, 100)
WARM_UP, MEASURED = 3.0, 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Sample:
    """A good record: its pair, and its image scaled down for the sheet (RGB)."""

    record: int
    key: str
    label: str
    captions: Sequence[str]
    size: tuple[int, int]  # px
    format: str
    thumbnail: Image.Image


@dataclasses.dataclass(frozen=True)
class Facts:
    """What :func:`inspect_source` found in the records that it read. Arrays have one entry per image or caption."""

    records: int  # number of records of the source
    looked_at: int  # number of records that were read
    bad: Counter  # reason: number of records
    bad_examples: dict[str, list[str]]  # reason: one line for each of the first records
    formats: Counter  # Pillow's name of the format: number of images
    labels: int  # number of different labels
    short_sides: np.ndarray  # px
    long_sides: np.ndarray  # px
    image_bytes: np.ndarray
    captions: np.ndarray  # number per image
    characters: np.ndarray  # number per caption
    tokens: np.ndarray  # number per caption, with start-of-text and end-of-text
    samples: list[Sample]  # some of the good records
    notes: list[str]  # see Source.notes

    @property
    def bad_share(self) -> float:
        return self.bad.total() / self.looked_at


def inspect_source(source: Source, samples: int) -> Facts:
    """Reads a source's records: all of them, or ``samples`` records drawn with a fixed seed.

    Raises:
      ValueError: the source is empty.
      ShardError: a file of the source is lost.
    """
    if not len(source):
        raise ValueError("the source has no pairs")
    looked_at = min(samples, len(source))
    drawn = np.random.default_rng(0).choice(len(source), looked_at, replace=False).tolist()
    shown = set(drawn[:SHEET_IMAGES])
    bad, bad_examples, formats, labels = Counter(), {}, Counter(), set()
    sides, image_bytes, captions, characters, tokens, found = [], [], [], [], [], []
    for record in sorted(drawn):
        try:
            pair = source[record]
            image = decode_image(pair.image)
            image_format = Image.open(io.BytesIO(pair.image)).format or "unknown"
        except ShardError:
            raise
        except Exception as error:  # data from the web raises errors of any kind
            reason = reason_of(error)
            bad[reason] += 1
            if bad[reason] <= BAD_EXAMPLES:
                where = f"{pair.key}: " if isinstance(error, ImageError) else ""
                bad_examples.setdefault(reason, []).append(f"{record}  {where}{error}")
            continue
        formats[image_format] += 1
        labels.add(pair.label)
        sides.append(sorted(image.size))
        image_bytes.append(len(pair.image))
        captions.append(len(pair.captions))
        characters += map(len, pair.captions)
        tokens += _token_counts(pair.captions)
        if record in shown:
            size = image.size
            image.thumbnail((SHEET_SIDE, SHEET_SIDE))
            found.append(Sample(record, pair.key, pair.label, pair.captions, size, image_format, image))
    short_sides, long_sides = np.array(sides, int).reshape(-1, 2).T
    arrays = map(np.array, (image_bytes, captions, characters, tokens))
    return Facts(
        len(source),
        looked_at,
        bad,
        bad_examples,
        formats,
        len(labels - {""}),
        short_sides,
        long_sides,
        *arrays,
        samples=found,
        notes=source.notes(),
    )


def _token_counts(captions: Sequence[str]) -> list[int]:
    # end-of-text is the last id that is not 0. Counting zeros would not do: "!" has the id 0, like the padding.
    rows = tokenize(list(captions), LONGEST_CAPTION, truncate=True)
    return [int(np.flatnonzero(row)[-1]) + 1 for row in rows]


def format_facts(facts: Facts) -> list[str]:
    """Returns the facts as lines of text."""
    share = "all of them" if facts.looked_at == facts.records else f"{facts.looked_at:,} of them, drawn with seed 0,"
    lines = [f"{facts.records:,} records; {share} were read"]
    bad = sum(facts.bad.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts.bad.most_common())
    lines.append(f"bad               {facts.bad_share:.2%}" + (f": {reasons}" if bad else ""))
    for reason, _ in facts.bad.most_common():
        lines += [f"  {reason}  {_printable(line)[:BAD_LENGTH]}" for line in facts.bad_examples[reason]]
    lines += [_printable(note) for note in facts.notes]
    good = facts.looked_at - bad
    if not good:
        return lines
    formats = ", ".join(f"{name} {count / good:.1%}" for name, count in facts.formats.most_common())
    truncated = (facts.tokens > CONTEXT_LENGTH).mean()
    lines += [
        f"formats           {formats}",
        f"labels            {facts.labels:,} different",
        f"truncated at {CONTEXT_LENGTH}   {truncated:.2%} of the captions",
        "",
        f"{'':<18}{'min':>11}{'5 %':>11}{'median':>11}{'95 %':>11}{'max':>11}",
    ]
    rows = {
        "short side, px": facts.short_sides,
        "long side, px": facts.long_sides,
        "image, bytes": facts.image_bytes,
        "captions per pair": facts.captions,
        "characters": facts.characters,
        "tokens": facts.tokens,
    }
    for name, values in rows.items():
        percentiles = np.percentile(values, PERCENTILES, method="nearest")
        lines.append(f"{name:<18}" + "".join(f"{int(value):>11,}" for value in percentiles))
    lines += ["", "samples"]
    for sample in facts.samples[:: max(1, len(facts.samples) // PRINTED_SAMPLES)][:PRINTED_SAMPLES]:
        width, height = sample.size
        more = f" and {len(sample.captions) - 1} more" if len(sample.captions) > 1 else ""
        lines.append(
            f"  {sample.record}  {_quoted(sample.key)}  {width} x {height} {sample.format}  "
            f"{_quoted(sample.captions[0])}{more}"
        )
    return lines


def _quoted(text: str, length: int = 80) -> str:
    """Returns the text in quotes, on one line and without control characters."""
    shown = text if len(text) <= length else f"{text[: length - 1]}…"
    return json.dumps("".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown), ensure_ascii=False)


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in line)


def contact_sheet(title: str, facts: Facts) -> str:
    """Returns one self-contained HTML page with the facts and the samples with their captions."""
    figures = []
    for sample in facts.samples:
        stream = io.BytesIO()
        sample.thumbnail.save(stream, "JPEG", quality=85)
        encoded = base64.b64encode(stream.getvalue()).decode()
        width, height = sample.thumbnail.size
        first, more = sample.captions[:CAPTIONS_SHOWN], sample.captions[CAPTIONS_SHOWN:]
        captions = _list(first)
        if more:
            captions += f"<details><summary>{len(more)} more</summary>{_list(more)}</details>"
        label = f"<p>class: {_escaped(sample.label)}</p>" if sample.label else ""
        figures.append(
            f'<figure><img alt="{_escaped(sample.captions[0])}" width="{width}" height="{height}" '
            f'src="data:image/jpeg;base64,{encoded}">'
            f"<figcaption>{label}{captions}"
            f"<p>{sample.record}: {_escaped(sample.key)}, {sample.size[0]} x {sample.size[1]} {sample.format}</p>"
            "</figcaption></figure>"
        )
    lines = format_facts(facts)
    table = "\n".join(lines[: lines.index("samples") - 1] if facts.samples else lines)
    return _PAGE.format(title=_escaped(title), table=_escaped(table), figures="\n".join(figures))


def _list(captions: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_escaped(caption)}</li>' for caption in captions)}</ul>"


def _escaped(text: str) -> str:
    return html.escape(text).encode("utf-8", "replace").decode()  # UTF-8 cannot encode half a surrogate pair


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #57606a; --card: #f6f8fa; --shadow: #0004 }}
@media (prefers-color-scheme: dark) {{ :root {{ --quiet: #9aa4af; --card: #20262d; --shadow: #fff4 }} }}
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 86rem; margin: 1.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere }}
pre {{ padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 14px;
  background: linear-gradient(90deg, var(--card) 40%, transparent) 0 0 / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--card) 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--shadow), transparent) 100% 0 / 0.8rem 100% no-repeat scroll, var(--card) }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: 0.8rem }}
figure {{ margin: 0; padding: 0.6rem; border-radius: 6px; background: var(--card) }}
img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 4px }}
ul {{ margin: 0.4rem 0 0; padding-left: 1.1rem; overflow-wrap: anywhere }}
p, summary {{ margin: 0.4rem 0 0; color: var(--quiet); font-size: 14px; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<pre>{table}</pre>
<main>
{figures}
</main>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Feed:
    """How fast the input pipeline of this host produces images."""

    images_per_second: float
    images_per_cpu_second: float | None  # None where the system does not report the workers' CPU time
    cores: int

    def hosts_for(self, pairs_per_second: float) -> int:
        """Returns how many hosts like this one produce that many pairs per second."""
        return max(1, math.ceil(pairs_per_second / self.images_per_second))


def measure_feed_speed(
    batches: Iterator[dict[str, np.ndarray]], warm_up: float = WARM_UP, measured: float = MEASURED
) -> Feed:
    """Measures how fast batches are produced.

    Args:
      batches: as :class:`clip_jax.data.pipeline.Batches`; ``image`` has the shape ``[B, ...]``.
      warm_up: seconds before the measurement; at least one batch is drawn.
      measured: seconds of the measurement; at least one batch is drawn.
    """
    _draw(batches, warm_up)
    cpu, start = _cpu_seconds(), time.perf_counter()
    images = _draw(batches, measured)
    seconds = time.perf_counter() - start
    cpu_after = _cpu_seconds()
    known = cpu is not None and cpu_after is not None and cpu_after > cpu
    return Feed(images / seconds, images / (cpu_after - cpu) if known else None, cores())


def _draw(batches: Iterator[dict[str, np.ndarray]], seconds: float) -> int:
    """Draws at least one batch until the time is over. Returns the number of images."""
    images, end = 0, time.perf_counter() + seconds
    while not images or time.perf_counter() < end:
        images += len(next(batches)["image"])
    return images


def _cpu_seconds() -> float | None:
    """Returns the CPU time of this process and its running children; None if the system does not report it."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in multiprocessing.active_children():
        try:
            fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc(5)
    return total


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
