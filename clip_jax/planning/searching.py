"""Searches for the largest batch that fits, and tries meshes and remat policies. Every try is a compilation."""

import math
from collections.abc import Callable, Iterator

import ml_collections

from clip_jax.models.execution import REMAT_POLICIES
from clip_jax.planning.compiling import PlanError
from clip_jax.planning.report import make_report
from clip_jax.planning.topologies import Topology

Try = Callable[[ml_collections.ConfigDict], dict]  # compiles a config and returns the facts
CLOSE_ENOUGH = 1 / 32  # of the largest batch: the search stops this close to the limit


def with_values(config: ml_collections.ConfigDict, **values) -> ml_collections.ConfigDict:
    """A copy of the config with other values, by dotted name with ``__`` for the dot."""
    copy = config.copy_and_resolve_references()  # a deep copy
    for name, value in values.items():
        *parents, key = name.split("__")
        part = copy
        for parent in parents:
            part = part[parent]
        part[key] = value
    return copy


def largest_batch(config: ml_collections.ConfigDict, topology: Topology, compile_one: Try) -> ml_collections.ConfigDict:
    """The config with the largest batch that fits, in steps of 8 pairs a device and to 3 % of the limit.

    The memory that is left over or missing with one batch determines the next batch to try.

    Raises:
      PlanError: not even 8 pairs a device fit.
    """
    unit = 8 * topology.devices * config.accumulation_steps
    fits, too_large = 0, None
    batch = max(unit, config.global_batch_size // unit * unit)
    while True:
        facts = compile_one(with_values(config, global_batch_size=batch))
        guess = _next_batch(facts, batch, topology)
        if facts["fits"]:
            fits = batch
        else:
            too_large = batch
        if too_large == unit:
            raise PlanError(
                f"not even {unit} pairs, 8 a device, fit on {topology.name}; see what a plan without --search says"
            )
        if too_large is not None and too_large - fits <= max(unit, fits * CLOSE_ENOUGH):
            return with_values(config, global_batch_size=fits)
        if too_large is None:
            guess = min(max(guess, fits * (1 + CLOSE_ENOUGH)), 16 * fits)
        elif fits:
            quarter = (too_large - fits) / 4
            guess = min(max(guess, fits + quarter), too_large - quarter)
        batch = max(int(guess) // unit * unit, fits + unit)
        batch = batch if too_large is None else min(batch, too_large - unit)


def guess_parts(config: ml_collections.ConfigDict, facts: dict, topology: Topology) -> int:
    """The number of accumulation steps, a power of two, with which a batch that did not fit should fit."""
    parts = config.global_batch_size / max(_next_batch(facts, config.global_batch_size, topology), 1)
    return 2 ** max(1, math.ceil(math.log2(parts)))


def _next_batch(facts: dict, batch: int, topology: Topology) -> float:
    """The batch that would just fill a chip, if all memory but parameters and optimizer state grows with the batch."""
    fixed = sum(size for name, size in facts["shard_bytes"].items() if name != "batch")
    available = topology.generation.hbm_bytes * 0.98
    if facts["fits"]:
        memory = facts["memory"]
        used = memory["arguments"] + memory["results"] - memory["in place"] + memory["temporaries"] + memory["program"]
    else:
        out = facts["out_of_memory"]
        available = out["available_bytes"] or available
        if out["needed_bytes"] is None:
            return batch / 2
        used = out["needed_bytes"] + (fixed if out["temporaries_only"] else 0)
    return batch * (available - fixed) / max(used - fixed, 1)


def meshes_and_remats(
    config: ml_collections.ConfigDict, topology: Topology, compile_one: Try
) -> Iterator[tuple[ml_collections.ConfigDict, dict]]:
    """Yields each config that was tried and its report, for each remat policy with fsdp = 1, 2, 4, ...

    For each policy, fsdp grows until the step fits, and then while the step gets faster.
    """
    for remat in REMAT_POLICIES:
        fsdp, best = 1, None
        while topology.devices % fsdp == 0 and fsdp <= topology.devices:
            candidate = with_values(config, mesh__fsdp=fsdp, model__remat=remat)
            report = make_report(candidate, topology, compile_one(candidate))
            yield candidate, report
            if report["fits"]:
                seconds = report["seconds"]["step"]
                if best is not None and seconds >= best:
                    break
                best = seconds
            fsdp *= 2
