"""Writes the table of ``docs/pods.md``: the TPU compiler's predictions for all nine models on three slices.

    python -m benchmarks.pod_plan [--models=vit_l14,rn50] [--topologies=v5litepod-256] [--known]

Compiles each config unchanged. If it doesn't fit, compiles it with more remat and then with accumulation; the table
states the changes. A compilation takes minutes. Its result is cached by program and compiler, so an interrupted run
continues where it was. The table is written after each row. With ``--known`` nothing is compiled. Rows that have not
been compiled are left out of the table and named on stderr. Needs ``[tpu]``, but no TPU.
"""

import difflib
import pathlib
import re
import sys

from clip_jax.command_line import Parser, command
from clip_jax.config import load_config_file
from clip_jax.planning import figures
from clip_jax.planning.advice import MAX_PARTS
from clip_jax.planning.compiling import PlanError, compile_facts, known_facts
from clip_jax.planning.report import make_report
from clip_jax.planning.searching import guess_parts, with_values
from clip_jax.planning.topologies import parse_topology

MODELS = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
REMATS = ("none", "attention", "full")
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- table: written by benchmarks/pod_plan.py -->", "<!-- end of the table -->"
HEADER = (
    "| model | slice | changes to the config | fsdp | HBM a chip | compiled / model flops | step | of it collectives "
    "| model flops utilization | pairs/s | days |"
)


def row(model: str, topology_name: str, known_only: bool) -> str | None:
    """Returns one line of the table, or None if it has not been compiled."""
    topology = parse_topology(topology_name)
    config = load_config_file(f"configs/{model}.py")

    def facts_of(changes: dict) -> dict | None:
        candidate = with_values(config, **changes)
        what = f"{model} on {topology_name} {_words(changes)}"
        return known_facts(candidate, topology) if known_only else compile_facts(candidate, topology, what)

    changes: dict = {}
    facts = facts_of(changes)
    for remat in REMATS[REMATS.index(config.model.remat) + 1 :]:
        if _too_large(facts):
            changes = {"model__remat": remat}
            facts = facts_of(changes)
    while _too_large(facts):
        parts = 2 * changes.get("accumulation_steps", 0) or min(guess_parts(config, facts, topology), MAX_PARTS)
        if parts > MAX_PARTS:
            return f"| {model} | {topology_name} | does not fit in {MAX_PARTS} parts |" + " |" * 8
        changes |= {"accumulation_steps": parts}
        facts = facts_of(changes)
    if facts is None:
        return None
    return format_row(model, topology_name, changes, make_report(with_values(config, **changes), topology, facts))


def _too_large(facts: dict | None) -> bool:
    return facts is not None and not facts["fits"]


def _words(changes: dict) -> str:
    return ", ".join(f"{name.replace('__', '.')} {value}" for name, value in changes.items())


def format_row(model: str, topology: str, changes: dict, report: dict) -> str:
    seconds = report["seconds"]
    cells = (
        model,
        topology,
        _words(changes) or "–",
        report["mesh"]["fsdp"],
        figures.format_bytes(report["memory"]["all"]),
        figures.format_number(report["compiled_to_model_flops"], 2),
        figures.format_seconds(seconds["step"]),
        f"≥ {figures.format_seconds(seconds['collectives_at_least'])}",
        figures.format_share(report["model_flops_utilization"], 1),
        figures.format_number(report["pairs_per_second"]),
        figures.format_number(report["days"], 2),
    )
    return f"| {' | '.join(map(str, cells))} |"


def write_table(rows: dict[tuple[str, str], str | None]) -> None:
    """Replaces the table in the page; the rest of the page is unchanged."""
    table = "\n".join([BEGIN, HEADER, "|---" * HEADER.count(" | ") + "|---|", *filter(None, rows.values()), END])
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, page, flags=re.S), encoding="utf-8"
    )


def chosen(flag: str, words: str, known: tuple[str, ...]) -> list[str]:
    """Splits ``words`` at commas; raises ValueError if one of them is not in ``known``."""
    for word in words.split(","):
        if word not in known:
            near = difflib.get_close_matches(word, known, 3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{flag}={word} is not in the table of {', '.join(known)}{meant}")
    return words.split(",")


@command("python -m benchmarks.pod_plan")
def main(argv: list[str], program: str) -> int:
    parser = Parser(prog=program, description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models", default=",".join(MODELS), help="names of configs; other rows are kept if they are cached"
    )
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="such as v5e:16x16, or Google's name for it")
    parser.add_argument("--known", action="store_true", help="compile nothing; write the cached rows")
    arguments = parser.read(argv)
    models = chosen("--models", arguments.models, MODELS)
    named = ",".join(parse_topology(one, "--topologies").name for one in arguments.topologies.split(","))
    topologies = chosen("--topologies", named, TOPOLOGIES)
    pairs = [(model, topology) for topology in TOPOLOGIES for model in MODELS]
    rows = {pair: row(*pair, known_only=True) for pair in pairs}
    write_table(rows)
    for pair in pairs:
        if arguments.known or pair[0] not in models or pair[1] not in topologies:
            continue
        try:
            rows[pair] = row(*pair, known_only=False)
        except PlanError as error:
            print(f"{pair[0]} on {pair[1]}: {error}", file=sys.stderr)
            continue
        print(rows[pair], flush=True)
        write_table(rows)
    left_out = [" on ".join(pair) for pair in pairs if rows[pair] is None]
    if left_out:
        print(f"left out, because not compiled yet: {', '.join(left_out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
