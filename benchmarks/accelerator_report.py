"""Summarizes the measurements of :mod:`benchmarks.accelerator`: best settings, ratios and tables; pure functions.

A measurement is a dictionary with ``part``, ``side``, ``case`` (equal for both sides), ``setting`` (chosen by each
side) and ``status`` ("ok", "does not fit", "failed: …", "no time" or "not there: …"). If the status is "ok", it also
has ``seconds`` (the median of one run), ``rate`` and the figures of its part, such as ``peak_bytes`` and
``model_flops``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

PARTS = ("check", "ceilings", "step", "loss", "embed", "start")
SIDES = ("clip_jax", "open_clip")
CEILING_SIDES = ("jax", "pytorch")


def best(measurements: Iterable[dict]) -> dict | None:
    """Returns the measurement with the highest rate among those that are "ok", or None."""
    return max((item for item in measurements if item["status"] == "ok"), key=lambda item: item["rate"], default=None)


def ratio(ours: dict | None, theirs: dict | None, what: str = "rate") -> float | None:
    """Returns ours divided by theirs, or None if either is missing."""
    return ours[what] / theirs[what] if ours and theirs and ours.get(what) and theirs.get(what) else None


def matrix_rate(measurements: Iterable[dict]) -> float | None:
    """Returns the higher of both sides' rates of the matrix product, in flop/s."""
    products = [m for m in measurements if m["part"] == "ceilings" and m["case"]["what"] == "matrix product"]
    fastest = best(products)
    return fastest and fastest["rate"]


def with_shares(measurements: list[dict]) -> list[dict]:
    """Adds ``matrix_share`` to steps: model flops per second over the measured matrix rate, or None without one."""
    ceiling = matrix_rate(measurements)

    def share(item: dict) -> dict:
        if item["part"] != "step" or item["status"] != "ok":
            return item
        return item | {"matrix_share": item["model_flops"] / item["seconds"] / ceiling if ceiling else None}

    return [share(item) for item in measurements]


def summarize(measurements: list[dict]) -> list[dict]:
    """Returns the best setting of each side and our ratio to theirs, for each part except the check and each case.

    ``ratio`` is that of speed, ``memory_ratio`` that of peak memory. Rates are pairs/s (step), embeddings/s, flop/s and
    bytes/s (ceilings), and 1/s (loss and start).
    """
    cases: list[tuple[str, dict]] = []
    for item in measurements:
        if item["part"] != "check" and (item["part"], item["case"]) not in cases:
            cases.append((item["part"], item["case"]))
    summary = []
    for part, case in cases:
        own = [item for item in measurements if (item["part"], item["case"]) == (part, case)]
        sides = CEILING_SIDES if part == "ceilings" else SIDES
        ours, theirs = (best(item for item in own if item["side"] == side) for side in sides)
        summary.append(
            {
                "part": part,
                "case": case,
                sides[0]: ours,
                sides[1]: theirs,
                "ratio": ratio(ours, theirs),
                "memory_ratio": ratio(ours, theirs, "peak_bytes"),
            }
        )
    return summary


# Tables


def label(setting: dict) -> str:
    """Returns ``{"remat": "none", "loss": "gather"}`` as "remat none, loss gather", without the batch size."""
    words = []
    for name, value in setting.items():
        if name == "compiled":
            words.append("compiled" if value else "eager")
        elif name == "fused_attention":
            words.append("attention fused" if value else "attention not fused")
        elif isinstance(value, bool):
            words += [name] if value else []
        elif name == "precision":
            words.append(value)
        elif name != "batch_size":
            words.append(f"{name} {value}")
    return ", ".join(words)


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, unit: str = "", scale: float = 1.0, digits: int = 3) -> str:
    """Formats a value with this number of significant digits; None gives "–"."""
    if value is None:
        return "–"
    text = f"{value / scale:#.{digits}g}"
    text = f"{float(text):,.0f}" if abs(float(text)) >= 10 ** (digits - 1) else text
    return f"{text} {unit}".rstrip()


def tables(report: dict) -> str:
    """Returns the report as the markdown of docs/performance.md."""
    measurements, device = report["measurements"], report["device"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"`{report['command']}`; {device['kind']}, {report['date'][:10]}, {versions}\n"]
    by_part = {part: [item for item in measurements if item["part"] == part] for part in PARTS}
    tried = {part: [item for item in items if item["status"] != "no time"] for part, items in by_part.items()}
    for item in tried["check"]:
        found = ""
        if "difference" in item:
            found = f"its gradients differ by at most {100 * item['difference']:.2g} % of their norm"
        lines.append(f"A step with and without fused attention, {item['case']['model']}: {item['status']} {found}\n")
    if tried["ceilings"]:
        units = {"matrix product": ("TFLOP/s in bfloat16", 1e12), "copy": ("GB/s, read and written", 1e9)}
        header = ["ceiling", "JAX", "PyTorch"]
        rows = [
            [entry["case"]["what"], *(rate(entry[side], *units[entry["case"]["what"]]) for side in CEILING_SIDES)]
            for entry in report["summary"]
            if entry["part"] == "ceilings"
        ]
        lines.append(markdown(header, rows))
    if tried["step"]:
        lines.append("Training step, each side with its best batch and setting:\n")
        lines.append(best_steps(report["summary"]))
        lines += [
            all_steps(model, tried["step"]) for model in in_order(item["case"]["model"] for item in tried["step"])
        ]
    if tried["loss"]:
        lines.append("The loss alone, value and gradients; speed and memory against open_clip's fastest:\n")
        lines.append(loss_table(tried["loss"]))
    if tried["embed"]:
        header = ["embeddings a second", "batch", "ours in", "clip_jax", "open_clip's best", "open_clip", "ratio"]
        lines.append(markdown(header, embedding_rows(tried["embed"])))
    if tried["start"]:
        header = ["from the start of the process to the first step", "setting", "empty caches", "filled caches"]
        lines.append(markdown(header, start_rows(tried["start"])))
    lines += [f"- {line}" for line in report["missing"]]
    if cases := left_out(measurements):
        lines.append(f"- no time for: {'; '.join(cases)}")
    return "\n".join(lines).rstrip() + "\n"


def left_out(measurements: Iterable[dict]) -> list[str]:
    """Returns the cases for which there was no time, with the number of settings."""
    cases = Counter(describe(item | {"setting": {}}, "") for item in measurements if item["status"] == "no time")
    return [f"{case} ({count} settings)" if count > 1 else case for case, count in cases.items()]


def in_order(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def rate(item: dict | None, unit: str, scale: float) -> str:
    return number(item and item["rate"], unit if item else "", scale)


def in_short(status: str) -> str:
    """Returns the status without its reason, which the report has."""
    return status.partition(":")[0]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def best_steps(summary: list[dict]) -> str:
    header = ["model", "side", "setting", "batch", "pairs/s", "peak memory", "of the matrix rate", "ratio"]
    rows = []
    for entry in summary:
        if entry["part"] != "step":
            continue
        for side in SIDES:
            item, ours = entry[side], side == "clip_jax"
            first = [entry["case"]["model"] if ours else "", side]
            last = number(entry["ratio"]) if ours else ""
            if item is None:
                rows.append([*first, *["–"] * 5, last])
                continue
            memory, share = number(item["peak_bytes"], "GB", 1e9), percent(item["matrix_share"])
            setting, batch = label(item["setting"]), f"{item['setting']['batch_size']:,}"
            rows.append([*first, setting, batch, number(item["rate"], digits=4), memory, share, last])
    return markdown(header, rows)


def all_steps(model: str, items: list[dict]) -> str:
    """Returns pairs/s and peak memory of every setting and batch size of a model."""
    items = [item for item in items if item["case"]["model"] == model]
    sizes = sorted({item["setting"]["batch_size"] for item in items})
    by_row: dict[tuple[str, str], dict[int, dict]] = {}
    for item in items:
        by_row.setdefault((item["side"], label(item["setting"])), {})[item["setting"]["batch_size"]] = item

    def cell(item: dict | None) -> str:
        if item is None:
            return ""
        if item["status"] != "ok":
            return in_short(item["status"])
        memory = f" ({number(item['peak_bytes'], 'GB', 1e9)})" if item["peak_bytes"] else ""
        return number(item["rate"], digits=4) + memory

    header = [f"{model}, pairs/s at batch", *(f"{size:,}" for size in sizes)]
    rows = ([" ".join(row), *(cell(cells.get(size)) for size in sizes)] for row, cells in by_row.items())
    return markdown(header, rows)


def loss_table(items: list[dict]) -> str:
    rows = []
    for pairs in in_order(item["case"]["pairs"] for item in items):
        own = [item for item in items if item["case"]["pairs"] == pairs]
        fastest = best(item for item in own if item["side"] == "open_clip")
        for item in own:
            ok = item["status"] == "ok"
            seconds = number(item["seconds"], "ms", 1e-3) if ok else in_short(item["status"])
            speed, memory = (number(ratio(item, fastest, what) if ok else None) for what in ("rate", "peak_bytes"))
            name, peak = f"{item['side']} {label(item['setting'])}", number(item.get("peak_bytes"), "GB", 1e9)
            rows.append([f"{pairs:,}", name, seconds, peak, speed, memory])
    return markdown(["N", "loss", "time", "peak memory", "speed", "memory"], rows)


def embedding_rows(items: list[dict]) -> Iterator[list[str]]:
    """Yields each side's best result for each model, input, batch size and precision of clip_jax."""
    for model, kind, size in in_order(
        (item["case"]["model"], item["case"]["input"], item["setting"]["batch_size"]) for item in items
    ):
        own = [
            item
            for item in items
            if item["case"] == {"model": model, "input": kind} and item["setting"]["batch_size"] == size
        ]
        for precision in in_order(item["setting"]["precision"] for item in own if item["side"] == "clip_jax"):
            ours = best(i for i in own if i["side"] == "clip_jax" and i["setting"]["precision"] == precision)
            theirs = best(i for i in own if i["side"] == "open_clip")
            rates = [number(item and item["rate"], digits=4) for item in (ours, theirs)]
            setting = label(theirs["setting"]) if theirs else "–"
            yield [f"{model} {kind}", f"{size:,}", precision, rates[0], setting, rates[1], number(ratio(ours, theirs))]


def start_rows(items: list[dict]) -> Iterator[list[str]]:
    for model, side, name in in_order((i["case"]["model"], i["side"], label(i["setting"])) for i in items):
        own = {
            item["case"]["caches"]: number(item["seconds"], "s") if item["status"] == "ok" else item["status"]
            for item in items
            if (item["case"]["model"], item["side"], label(item["setting"])) == (model, side, name)
        }
        yield [f"{model} {side}", name, *(in_short(own.get(caches, "")) for caches in ("empty", "filled"))]


def describe(item: dict, side: str | None = None) -> str:
    """Describes a measurement in a few words; ``side`` replaces its own side."""
    case = " ".join(str(value) for name, value in item["case"].items() if name not in ("size", "width"))
    batch = f" batch {item['setting']['batch_size']}" if "batch_size" in item["setting"] else ""
    side = item["side"] if side is None else side
    return f"{item['part']} {case}{batch}, {side} {label(item['setting'])}".rstrip(" ,")


def progress(item: dict) -> str:
    text = f"{describe(item)}: {item['status']}"
    if item["status"] == "ok":
        text += f", {number(item['seconds'], 's')}"
    return f"{text}, whole process {item['process_seconds']:.0f} s" if "process_seconds" in item else text
