"""What the compiler for TPUs predicts for all nine models on three slices, as the table of ``docs/pods.md``.

    python -m benchmarks.pod_plan [--models=vit_l14,rn50] [--topologies=v5e:16x16] [--known]

Compiles each config as it stands; where it doesn't fit, with the next of a few changes, which the table names. A
compilation takes minutes. What was compiled before by the same program and compiler is known, so an interrupted run
goes on where it was, and the table is written anew after each row. With ``--known`` nothing is compiled. Needs
``[tpu]``, and no TPU.
"""

import argparse
import pathlib
import re
import sys

from clip_jax.config import load_config_file
from clip_jax.planning.compiling import PlanError, compile_facts, known_facts
from clip_jax.planning.report import make_report
from clip_jax.planning.searching import with_values
from clip_jax.planning.topologies import GIB, parse_topology

MODELS = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
# Tried in this order until one fits: the config as it stands first.
CHANGES = (
    {},
    {"mesh__fsdp": 16},
    {"mesh__fsdp": 16, "model__remat": "full"},
)
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- table: written by benchmarks/pod_plan.py -->", "<!-- end of the table -->"
HEADER = (
    "| model | slice | changes to the config | HBM a chip | compiled / model flops | step | of it collectives "
    "| model flops utilisation | pairs/s | days |"
)


def row(model: str, topology_name: str, known_only: bool) -> str:
    """One line of the table; what has not been compiled is said to be so."""
    topology = parse_topology(topology_name)
    config = load_config_file(f"configs/{model}.py")
    tried = set()
    for changes in CHANGES:
        candidate = with_values(config, **changes)
        values = (candidate.mesh.fsdp, candidate.model.remat)
        if values in tried:
            continue
        tried.add(values)
        facts = known_facts(candidate, topology)
        if facts is None:
            if known_only:
                return f"| {model} | {topology_name} | not computed |" + " |" * 7
            facts = compile_facts(
                candidate, topology, f"{model} on {topology_name}, fsdp {values[0]}, remat {values[1]}"
            )
        if facts["fits"]:
            changed = ", ".join(f"{name.replace('__', '.')} {value}" for name, value in changes.items()) or "–"
            return format_row(model, topology_name, changed, make_report(candidate, topology, facts))
    needed = facts["out_of_memory"]["needed_bytes"]
    return f"| {model} | {topology_name} | does not fit, however split: {needed / GIB:.0f} GiB |" + " |" * 7


def format_row(model: str, topology: str, changed: str, report: dict) -> str:
    seconds = report["seconds"]
    cells = (
        model,
        topology,
        changed,
        f"{report['memory']['all'] / GIB:.1f} GiB",
        f"{report['compiled_to_model_flops']:.2f}",
        f"{seconds['step']:.3f} s",
        f"≥ {seconds['collectives_at_least']:.3f} s",
        f"{report['model_flops_utilization']:.1%}",
        f"{report['pairs_per_second']:,.0f}",
        f"{report['days']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


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
