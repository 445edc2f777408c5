"""Makes the report of a plan from the compiler's results: the figures, and the text. Nothing here compiles."""

import collections
import math

import ml_collections

from clip_jax.models.presets import model_preset
from clip_jax.planning.advice import advice
from clip_jax.planning.figures import (
    format_bytes,
    format_flops,
    format_number,
    format_seconds,
    format_share,
    format_span,
)
from clip_jax.planning.model_flops import step_flops
from clip_jax.planning.program import PARTS
from clip_jax.planning.topologies import Topology

PAPER_PAIRS = 400_000_000  # the paper's own data set, WIT (section 2.2)
TOP = 10  # costliest operations to list


def make_report(
    config: ml_collections.ConfigDict,
    topology: Topology,
    facts: dict,
    pairs: int = PAPER_PAIRS,
    chip_hour_price: float | None = None,
) -> dict:
    """All figures of a plan as JSON types: bytes, flops and seconds, for one device unless the name says otherwise.

    A device is a chip, or on v2 and v3 one of a chip's two cores.

    Args:
      config: the config that ``facts`` were compiled from.
      topology: the slice.
      facts: what :func:`clip_jax.planning.compiled.compile_step` returned.
      pairs: number of pairs in the source. With the config's epochs it determines the number of steps.
      chip_hour_price: price of one chip for an hour, in any currency; None leaves the cost out.
    """
    report = {
        "model": config.model.name,
        "topology": topology.name,
        "accelerator_type": topology.accelerator_type,
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": facts["mesh"],
        "global_batch_size": config.global_batch_size,
        "accumulation_steps": config.accumulation_steps,
        "pairs_per_device": config.global_batch_size // topology.devices,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "num_parameters": facts["num_parameters"],
        "versions": facts["versions"],
        "fits": facts["fits"],
        "hbm_bytes": topology.generation.hbm_bytes,
        "matmul_share": topology.generation.matmul_share,
    }
    if not facts["fits"]:
        return report | {
            "memory": dict(facts["shard_bytes"]),
            "out_of_memory": facts["out_of_memory"],
            "largest": facts["largest"],
            "kept_bytes": facts["kept_bytes"],
            "loss_form": facts["loss"]["form"],
            "loss_memory_option": facts["loss"]["memory_option"],
        }
    report |= _figures_of_step(config, topology, facts)
    steps = config.steps or math.ceil(config.epochs * pairs / config.global_batch_size)
    days = steps * report["seconds"]["step"] / 86_400
    report |= {
        "pairs": None if config.steps else pairs,
        "steps": steps,
        "smaller_steps": config.progressive_resolution.steps,
        "days": days,
    }
    if chip_hour_price is not None:
        report["cost"] = days * 24 * topology.chips * chip_hour_price
    return report


def _figures_of_step(config: ml_collections.ConfigDict, topology: Topology, facts: dict) -> dict:
    """The report's figures of one step that fits."""
    program = facts["program"]
    needed = step_flops(model_preset(config), config.global_batch_size, config.model.patch_dropout)
    flops = {name: total / topology.devices for name, total in needed.items()}
    model_flops = sum(flops.values())
    seconds = _seconds(topology, program)
    return {
        "memory": memory_by_what(facts),
        "model_flops": {**flops, "all": model_flops},
        "compiled_flops": program["matmul_flops"],
        "compiled_to_model_flops": program["matmul_flops"] / model_flops,
        "bytes_accessed": program["hbm_bytes"],
        "bytes_accessed_seconds": program["hbm_bytes"] / topology.generation.hbm_bandwidth,
        "collectives": collectives_by_kind(topology, program),
        "seconds": seconds,
        "seconds_by_part": _seconds_by(topology, program, lambda part, direction, work, label: part),
        "seconds_by_direction": _seconds_by(topology, program, lambda part, direction, work, label: direction or part),
        "seconds_by_work": _seconds_by(topology, program, lambda part, direction, work, label: work),
        "costliest": _costliest(topology, program),
        "not_counted": program["not_counted"],
        "unknown_loops": program["unknown_loops"],
        "is_scheduled": program["is_scheduled"],
        "model_flops_utilization": model_flops / seconds["step"] / topology.generation.peak_flops,
        "pairs_per_second": config.global_batch_size / seconds["step"],
    }


def memory_by_what(facts: dict) -> dict[str, int]:
    """Bytes of HBM on one device, by use. ``padding`` is what layouts add to parameters, optimizer state and batch."""
    memory, shards = facts["memory"], facts["shard_bytes"]
    parts = {name: size for name, size in shards.items() if size}
    parts["padding"] = max(0, memory["arguments"] - sum(shards.values()))
    parts["results not in place"] = max(0, memory["results"] - memory["in place"])
    parts["temporaries"] = memory["temporaries"]
    parts["program"] = memory["program"]
    return parts | {"all": sum(parts.values())}


def _floor(topology: Topology, collective: dict) -> float:
    """Seconds that a collective takes if it uses all links of a chip alone and at full speed."""
    return collective["received_bytes"] / topology.generation.interconnect


def _exposed(topology: Topology, collective: dict) -> float:
    """The part of the floor, in seconds, that no computation between the collective's start and end hides."""
    overlapped = collective["overlapped_cycles"] / topology.generation.clock
    return max(0.0, _floor(topology, collective) - overlapped)


def _seconds(topology: Topology, program: dict) -> dict[str, float]:
    compute = sum(cycles for *_, cycles in program["cycles"]) / topology.generation.clock
    collectives = sum(one["times"] * _exposed(topology, one) for one in program["collectives"])
    return {"compute": compute, "collectives_at_least": collectives, "step": compute + collectives}


def collectives_by_kind(topology: Topology, program: dict) -> list[dict]:
    """One entry for each kind: count in a step, bytes, how many overlap with compute, and the floor of their time."""
    kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for one in program["collectives"]:
        sums = kinds[one["kind"]]
        sums["count"] += one["times"]
        sums["bytes"] += one["times"] * one["num_bytes"]
        sums["overlapping"] += one["times"] * (one["asynchronous"] and one["overlapped_cycles"] > 0)
        sums["seconds_at_least"] += one["times"] * _floor(topology, one)
        sums["exposed_seconds"] += one["times"] * _exposed(topology, one)
    entries = [{"kind": kind, **sums} for kind, sums in kinds.items()]
    return sorted(entries, key=lambda entry: -entry["bytes"])


def _seconds_by(topology: Topology, program: dict, key) -> dict[str, float]:
    sums: collections.Counter = collections.Counter()
    for *names, cycles in program["cycles"]:
        sums[key(*names)] += cycles / topology.generation.clock
    return dict(sums.most_common())


def _costliest(topology: Topology, program: dict) -> list[dict]:
    rows = sorted(program["cycles"], key=lambda row: -row[-1])[:TOP]
    clock = topology.generation.clock
    return [
        {"part": part, "direction": direction, "work": work, "operation": label, "seconds": cycles / clock}
        for part, direction, work, label, cycles in rows
    ]


def _device(report: dict) -> str:
    """The word for one of JAX's devices: ``chip``, or on v2 and v3 ``core``."""
    return "chip" if report["devices"] == report["chips"] else "core"


def format_report(report: dict) -> list[str]:
    """The lines that ``clip_jax.plan`` prints."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    device = _device(report)
    known_as = f" ({report['accelerator_type']})" if report["accelerator_type"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name != "jaxlib")
    lines = [
        f"{report['model']} ({report['num_parameters']:,} parameters) on {report['topology']}{known_as}: "
        f"{report['chips']} chips, mesh {mesh}",
        f"batch {report['global_batch_size']:,} ({report['pairs_per_device']:,} pairs a {device}), "
        f"remat {report['remat']}, {report['dtype']}; compiled by {versions}",
        "",
    ]
    if not report["fits"]:
        return lines + _format_too_large(report)
    lines += _format_memory_and_work(report) + _format_seconds(report)
    lines += ["", "Not in the prediction:", *(f"  - {line}" for line in left_out(report)), ""]
    run = (
        f"{report['steps']:,} steps"
        if report["pairs"] is None
        else (
            f"{report['steps']:,} steps (over {report['pairs']:,} pairs"
            + (", the paper's number; --pairs=N for yours)" if report["pairs"] == PAPER_PAIRS else ")")
        )
    )
    lines += [
        f"Model flops utilization {format_share(report['model_flops_utilization'], 1)}, "
        f"{format_number(report['pairs_per_second'])} pairs/s "
        f"({format_number(report['pairs_per_second'] / report['chips'], 1)} a chip)",
        f"The config's run: {run}, {format_span(report['days'] * 86_400)}"
        + (f", cost {format_number(report['cost'], 2)}" if "cost" in report else ""),
    ]
    return lines


def _format_memory_and_work(report: dict) -> list[str]:
    memory, device = report["memory"], _device(report)
    lines = [f"It fits: {format_bytes(memory['all'])} of {format_bytes(report['hbm_bytes'])} HBM on each {device}"]
    lines += [f"  {name:22} {format_bytes(size):>12}" for name, size in memory.items() if name != "all" and size]
    flops = report["model_flops"]
    parts = ", ".join(f"{name} {format_share(size, flops['all'])}" for name, size in flops.items() if name != "all")
    lines += [
        "",
        f"Flops on each {device}: the model needs {format_flops(flops['all'])} ({parts})",
        f"  compiled: {format_flops(report['compiled_flops'])} in matrix products, "
        f"{format_number(report['compiled_to_model_flops'], 3)} times the model's",
        f"  to and from HBM: {format_bytes(report['bytes_accessed'])}, "
        f"{format_seconds(report['bytes_accessed_seconds'])} at its published bandwidth",
        "",
        "Collectives in a step      count        bytes  overlapping  at least  of it not hidden",
    ]
    lines += [
        f"  {one['kind']:22} {one['count']:7,} {format_bytes(one['bytes']):>12} {one['overlapping']:12,} "
        f"{format_seconds(one['seconds_at_least']):>9} {format_seconds(one['exposed_seconds']):>18}"
        for one in report["collectives"]
    ] or ["  none"]
    return lines


def _format_seconds(report: dict) -> list[str]:
    seconds = report["seconds"]
    lines = [
        "",
        f"Predicted step: {format_seconds(seconds['step'])}, of which the compiler estimates "
        f"{format_seconds(seconds['compute'])} for computing; collectives add at least "
        f"{format_seconds(seconds['collectives_at_least'])}",
    ]
    by_part = report["seconds_by_part"]
    lines.append(
        "  by part:  " + _shares({name: by_part[name] for name in PARTS if name in by_part}, seconds["compute"])
    )
    lines.append("  by pass:  " + _shares(report["seconds_by_direction"], seconds["compute"]))
    lines.append("  by work:  " + _shares(report["seconds_by_work"], seconds["compute"]))
    lines.append("  costliest operations:")
    lines += [
        f"    {format_seconds(one['seconds']):>9} {format_share(one['seconds'], seconds['compute']):>6}  "
        f"{' '.join(filter(None, (one['part'], one['direction'])))}: {one['operation']} ({one['work']})"
        for one in report["costliest"]
    ]
    return lines


def _shares(seconds: dict[str, float], whole: float) -> str:
    return ", ".join(
        f"{name} {format_seconds(value)} ({format_share(value, whole)})" for name, value in seconds.items()
    )


def left_out(report: dict) -> list[str]:
    """What the predicted step time leaves out, in sentences."""
    lines = [
        "it is a prediction: no TPU was measured. The compiler's own estimates are added up along its schedule; for a "
        f"large matrix product they come to {report['matmul_share']:.0%} of the published peak",
        "elementwise work and reductions are estimated about twice too slow",
        "of collectives only a floor is counted: every link of a chip at its published rate, no latency, and nothing "
        "for two that share links at the same time",
        "input pipeline, checkpoints, evaluation and other interruptions",
    ]
    if report["not_counted"]:
        sums: collections.Counter = collections.Counter()
        for name, times in report["not_counted"].items():
            opcode, _, origin = name.partition(" of ")
            sums[origin.split("/")[-1] if opcode == "fusion" else opcode] += times
        names = ", ".join(f"{name} ({times:,} times)" for name, times in sums.most_common())
        lines.append(f"operations that the compiler gives no estimate for: {names}")
    if report["smaller_steps"]:
        lines.append(f"that the first {report['smaller_steps']:,} steps, of smaller images, take less than the others")
    if report["unknown_loops"]:
        lines.append(f"{report['unknown_loops']} loops whose number of turns could not be read; one is counted of each")
    if not report["is_scheduled"]:
        lines.append("the program's text is not in the order of its schedule, so overlaps are not known")
    return lines


def _format_too_large(report: dict) -> list[str]:
    memory, out, device = report["memory"], report["out_of_memory"], _device(report)
    state = sum(memory.values())
    needed, available = out["needed_bytes"], out["available_bytes"] or report["hbm_bytes"]
    if needed is None:
        first = f"It does not fit into the {format_bytes(available)} of HBM on each {device}"
    elif out["temporaries_only"]:
        first = (
            f"It does not fit: temporaries alone need {format_bytes(needed)} of the {format_bytes(available)} of HBM "
            f"on each {device}, and {format_bytes(state)} are taken already"
        )
    else:
        first = (
            f"It does not fit: {format_bytes(needed)} are needed of the {format_bytes(available)} of HBM "
            f"on each {device}"
        )
    lines = [first, *(f"  {name:22} {format_bytes(size):>12}" for name, size in memory.items() if size)]
    if report["largest"]:
        lines += ["", f"The largest places in each {device}'s HBM, and the largest array in each:"]
        lines += [f"  {format_bytes(one['num_bytes']):>12}  {one['shape']}  {one['name']}" for one in report["largest"]]
    return [*lines, "", "What to change:", *(f"  - {line}" for line in advice(report))]
