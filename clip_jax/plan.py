"""Plans training on a TPU slice without a TPU: compiles the training step for the slice and reports its cost.

    python -m clip_jax.plan --config=configs/vit_l14.py --topology=v5p-512 [--config.mesh.fsdp=4 ...]

Needs the compiler for TPUs: pip install "clip-jax-tpu[tpu]". Exit codes: 0 it fits, 1 it does not or the command
failed (a line ``failed: ...``), 2 a mistake in the command (one line), 3 interrupted.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from clip_jax.command_line import DONE, Parser, command, read_config, run, set_up_logging

if TYPE_CHECKING:
    import ml_collections

    from clip_jax.planning.topologies import Topology

PROGRAM = "python -m clip_jax.plan"
DOES_NOT_FIT = 1  # exit code


def parse_arguments(argv: list[str], program: str = PROGRAM) -> tuple[argparse.Namespace, "ml_collections.ConfigDict"]:
    """Returns the flags, and the config with its overrides.

    Raises:
      ValueError, FileNotFoundError: a flag is unknown or its value is wrong, or the config is missing.
    """
    from clip_jax.config import validate
    from clip_jax.planning.report import PAPER_PAIRS

    parser = Parser(
        prog=program,
        description="Compiles the training step of a config for a TPU slice, without a TPU, and tells whether it fits, "
        "what it costs and how long it is predicted to take.",
    )
    parser.add_config("configs/vit_l14.py")
    parser.add_argument(
        "--topology", required=True, help="the slice: v5e:16x16, v5p:8x8x4, or as Google names it: v5litepod-256"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument(
        "--pairs", type=int, default=PAPER_PAIRS, help="how many the source holds; the paper's 400 million"
    )
    parser.add_argument("--chip-hour-price", type=float, help="of one chip for an hour; the run's cost is printed")
    parser.add_argument(
        "--search",
        choices=("batch", "mesh"),
        help="look for the largest batch that fits, or for the mesh and remat with the shortest predicted step",
    )
    known = parser.read(argv)
    if known.pairs < 1:
        raise ValueError(f"--pairs={known.pairs} must be positive")
    if known.chip_hour_price is not None and not 0 <= known.chip_hour_price < float("inf"):
        raise ValueError(f"--chip-hour-price={known.chip_hour_price} must be a price")
    config = read_config(known)
    if not config.data.source:
        config.data.source = "none"  # a plan needs no data, but validate() requires a source
    validate(config)
    return known, config


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    arguments, config = parse_arguments(argv, program)
    from clip_jax.planning.compiling import compile_facts
    from clip_jax.planning.report import format_report, make_report
    from clip_jax.planning.topologies import parse_topology

    set_up_logging()
    topology = parse_topology(arguments.topology)
    if arguments.search:
        config = _search(arguments.search, config, topology)
    facts = compile_facts(config, topology)
    report = make_report(config, topology, facts, arguments.pairs, arguments.chip_hour_price)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(format_report(report)))
    return DONE if report["fits"] else DOES_NOT_FIT


def _search(what: str, config: "ml_collections.ConfigDict", topology: "Topology") -> "ml_collections.ConfigDict":
    """Returns the best config that the search finds, and prints each try on standard error.

    Raises:
      PlanError: nothing fits.
    """
    from clip_jax.planning.compiling import PlanError, compile_facts
    from clip_jax.planning.figures import format_seconds
    from clip_jax.planning.report import make_report
    from clip_jax.planning.searching import largest_batch, meshes_and_remats

    def compile_one(candidate: "ml_collections.ConfigDict") -> dict:
        name = f"batch {candidate.global_batch_size}, fsdp {candidate.mesh.fsdp}, remat {candidate.model.remat}"
        facts = compile_facts(candidate, topology, name)
        report = make_report(candidate, topology, facts)
        result = f"{format_seconds(report['seconds']['step'])} a step" if report["fits"] else "does not fit"
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        return facts

    if what == "batch":
        return largest_batch(config, topology, compile_one)
    tried = [
        (report["seconds"]["step"], candidate)
        for candidate, report in meshes_and_remats(config, topology, compile_one)
        if report["fits"]
    ]
    if not tried:
        raise PlanError(f"no mesh and no remat makes a batch of {config.global_batch_size} fit on {topology.name}")
    _, best = min(tried, key=lambda one: one[0])
    print(
        f"the best of them: --config.mesh.fsdp={best.mesh.fsdp} --config.model.remat={best.model.remat}",
        file=sys.stderr,
    )
    return best


if __name__ == "__main__":
    run(main)
