"""What the compiler for TPUs predicts for all nine models on three slices, as the table of ``docs/pods.md``.

    python -m benchmarks.pod_plan [--models=vit_l14,rn50] [--topologies=v5e:16x16] [--known]

Compiles each config as it stands; where it doesn't fit, with more remat and with accumulation, as the table says. A
compilation takes minutes. What was compiled before by the same program and compiler is known, so an interrupted run
goes on where it was, and the table is written anew after each row. With ``--known`` nothing is compiled. Needs
``[tpu]``, and no TPU.
"""

import argparse
import pathlib
import re
import sys

from clip_jax.config import load_config_file
from clip_jax.planning.advice import MOST_PARTS
from clip_jax.planning.compiling import PlanError, compile_facts, known_facts
from clip_jax.planning.report import make_report
from clip_jax.planning.searching import guess_parts, with_values
from clip_jax.planning.topologies import GIB, parse_topology

MODELS = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
REMATS = ("none", "attention", "full")
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- table: written by benchmarks/pod_plan.py -->", "<!-- end of the table -->"
HEADER = (
    "| model | slice | changes to the config | fsdp | HBM a chip | compiled / model flops | step | of it collectives "
    "| model flops utilisation | pairs/s | days |"
)


def row(model: str, topology_name: str, known_only: bool) -> str:
    """One line of the table; what has not been compiled is said to be so."""
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
        parts = 2 * changes.get("accumulation_steps", 0) or min(guess_parts(config, facts, topology), MOST_PARTS)
        if parts > MOST_PARTS:
            return f"| {model} | {topology_name} | does not fit in {MOST_PARTS} parts |" + " |" * 8
        changes |= {"accumulation_steps": parts}
        facts = facts_of(changes)
    if facts is None:
        return f"| {model} | {topology_name} | not computed |" + " |" * 8
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
        f"{report['memory']['all'] / GIB:.1f} GiB",
        f"{report['compiled_to_model_flops']:.2f}",
        f"{seconds['step']:.3f} s",
        f"≥ {seconds['collectives_at_least']:.3f} s",
        f"{report['model_flops_utilization']:.1%}",
        f"{report['pairs_per_second']:,.0f}",
        f"{report['days']:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def write_table(rows: list[str]) -> None:
    """Puts the table in its place in the page; the page's own words stay as they are."""
    table = "\n".join([BEGIN, HEADER, "|---" * HEADER.count(" | ") + "|---|", *rows, END])
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, page, flags=re.S), encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pod_plan", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models", default=",".join(MODELS), help="names of configs; the others' rows are kept if known"
    )
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--known", action="store_true", help="compile nothing, write what is known")
    arguments = parser.parse_args()
    models, topologies = arguments.models.split(","), arguments.topologies.split(",")
    pairs = [(model, topology) for topology in TOPOLOGIES for model in MODELS]
    rows = {pair: row(*pair, known_only=True) for pair in pairs}
    write_table(list(rows.values()))
    for pair in pairs:
        if arguments.known or pair[0] not in models or pair[1] not in topologies:
            continue
        try:
            rows[pair] = row(*pair, known_only=False)
        except PlanError as error:
            print(f"{pair[0]} on {pair[1]}: {error}", file=sys.stderr)
            continue
        print(rows[pair], flush=True)
        write_table(list(rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
