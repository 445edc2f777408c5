"""Suggests changes that make a training step fit into memory, and estimates how many bytes each change saves."""

import math
from typing import NamedTuple

from clip_jax.models.execution import REMAT_POLICIES
from clip_jax.planning.figures import format_bytes
from clip_jax.planning.topologies import GENERATIONS, Topology, named_slices, parse_topology

MAX_PARTS = 64  # the largest suggested factor for accumulation_steps


class Need(NamedTuple):
    """Bytes of HBM on one device, as far as the compiler reported them.

    ``state`` is parameters, optimizer state, running averages and batch. ``loss`` is the loss's largest arrays.
    ``towers`` is all other temporaries.
    """

    state: int
    towers: int
    loss: int
    available: int

    def fits(self, towers: float, loss: float) -> bool:
        return self.state + towers + loss <= self.available


def need_of(report: dict) -> Need:
    """The memory that a step needs; if the compiler reported none, what the towers keep for the backward pass."""
    out, state = report["out_of_memory"], sum(report["memory"].values())
    available = round(out["available_bytes"] or report["hbm_bytes"])
    needed = out["needed_bytes"] or report["kept_bytes"][report["remat"]]
    if out["needed_bytes"] and not out["temporaries_only"]:
        needed = max(0, needed - state)
    loss = min(needed, sum(one["num_bytes"] for one in report["largest"] if one["name"].startswith("loss")))
    return Need(state, needed - loss, loss, available)


def advice(report: dict) -> list[str]:
    """The suggested changes: one line each, with about how many bytes it saves on each device, largest saving first.

    The savings are estimates from what the compiler reported, and for remat from what JAX saves.
    """
    need = need_of(report)
    found = [
        *_more_fsdp(report),
        *_more_remat(report, need),
        *_smaller_loss(report, need),
        *_parts(report, need),
        *_smaller_batch(report, need),
        *_more_chips(report, need),
        *_more_memory(report),
    ]
    worth_a_line = [one for one in found if one[0] >= need.available / 100] or found
    return [f"{words} {format_bytes(saved)}: {option}" for saved, words, option in sorted(worth_a_line, reverse=True)]


Saving = tuple[float, str, str]  # bytes on one device, the change in words, and the option


def _more_fsdp(report: dict) -> list[Saving]:
    fsdp, devices = report["mesh"]["fsdp"], report["devices"]
    state = report["memory"]["parameters"] + report["memory"]["optimizer state"]
    wider = max((size for size in range(2, min(devices, 8 * fsdp) + 1) if devices % size == 0), default=1)
    if wider <= fsdp:
        return []
    words = "split parameters and optimizer state over more devices: saves"
    return [(state * (1 - fsdp / wider), words, f"--config.mesh.fsdp={wider}")]


def _more_remat(report: dict, need: Need) -> list[Saving]:
    kept, words = report["kept_bytes"], "recompute more in the backward pass: saves about"
    savings = {remat: kept[report["remat"]] - kept[remat] for remat in REMAT_POLICIES}
    return [
        (min(saved, need.towers), words, f"--config.model.remat={remat}")
        for remat, saved in savings.items()
        if saved > 0
    ]


def _smaller_loss(report: dict, need: Need) -> list[Saving]:
    option = report["loss_memory_option"]
    return [(need.loss, "hold one block of the loss at a time: saves about", option)] if option and need.loss else []


def _parts(report: dict, need: Need) -> list[Saving]:
    """The fewest parts that fit by this estimate; if none fit, the most parts."""
    pairs = report["pairs_per_device"] // report["accumulation_steps"]
    possible = [2**power for power in range(1, MAX_PARTS.bit_length()) if pairs % 2**power == 0]
    if not possible:
        return []
    parts = next((one for one in possible if need.fits(need.towers / one, need.loss)), possible[-1])
    words = "embed the same batch in parts, for one more forward pass: saves about"
    option = f"--config.accumulation_steps={parts * report['accumulation_steps']}"
    return [(need.towers * (1 - 1 / parts), words, option)]


def _smaller_batch(report: dict, need: Need) -> list[Saving]:
    """The largest batch that fits by this estimate. A loss that holds rows of similarities shrinks with its square."""
    square = need.loss if report["loss_memory_option"] else 0
    linear, left = need.towers + need.loss - square, max(0, need.available - need.state)
    share = (math.sqrt(linear**2 + 4 * square * left) - linear) / (2 * square) if square else left / max(linear, 1)
    unit = report["devices"] * report["accumulation_steps"]
    batch = max(unit, int(min(share, 1) * report["global_batch_size"]) // unit * unit)
    if batch >= report["global_batch_size"]:
        return []
    share = batch / report["global_batch_size"]
    saved = linear * (1 - share) + square * (1 - share**2)
    return [(saved, "take a smaller batch: saves about", f"--config.global_batch_size={batch}")]


def _more_chips(report: dict, need: Need) -> list[Saving]:
    """A larger slice whose devices divide the batch: the smallest that fits by this estimate, or else the largest."""
    topology = parse_topology(report["topology"])
    slices = [
        one
        for one in named_slices(topology.generation)
        if one.chips > topology.chips and report["global_batch_size"] % one.devices == 0
    ]
    if not slices:
        return []

    def share(one: Topology) -> float:
        return topology.chips / one.chips

    larger = next((one for one in slices if need.fits(need.towers * share(one), need.loss * share(one))), slices[-1])
    saved = (need.towers + need.loss) * (1 - share(larger))
    return [(saved, "take more chips: saves about", f"--topology={larger.accelerator_type}")]


def _more_memory(report: dict) -> list[Saving]:
    """A slice of at least as many chips of the generation with the most memory, if that is another one."""
    most = max(GENERATIONS.values(), key=lambda one: one.hbm_bytes)
    more = most.hbm_bytes - report["hbm_bytes"]
    same = [one for one in named_slices(most) if one.chips >= report["chips"]]
    if more <= 0 or not same:
        return []
    return [(more, "take chips with more memory: adds", f"--topology={same[0].accelerator_type}")]
