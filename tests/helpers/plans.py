"""What a compiler returned for a step: made-up facts for tests of the planner's reports and advice."""

from clip_jax.planning.topologies import GIB


def facts(**changes):
    cycles = [
        ["vision tower", "forward", "matrix products", "fc1", 1_200_000_000],
        ["loss", "forward", "elementwise, reductions and copies", "exp", 300_000_000],
    ]
    hidden = {
        "kind": "all-gather",
        "num_bytes": 2_000_000_000,
        "received_bytes": 1_000_000_000,
        "group_size": 2,
        "times": 3,
        "asynchronous": True,
        "op_name": "",
        "overlapped_cycles": 6_000_000,  # 4 ms of the 5 that it takes on v5e
    }
    open_one = hidden | {"kind": "all-reduce", "times": 1, "asynchronous": False, "overlapped_cycles": 0}
    return {
        "loss": {"form": "gather", "memory_option": "--config.loss.form=blockwise"},
        "mesh": {"data": 2, "fsdp": 2},
        "num_parameters": 151_277_313,
        "shard_bytes": {"parameters": 3 * GIB, "optimizer state": 6 * GIB, "running averages": 0, "batch": GIB},
        "versions": {"jax": "1", "jaxlib": "1", "libtpu": "1"},
        "fits": True,
        "memory": {
            "arguments": 11 * GIB,
            "results": 9 * GIB,
            "in place": 9 * GIB,
            "temporaries": 2 * GIB,
            "program": GIB,
        },
        "program": {
            "cycles": cycles,
            "matmul_flops": 10**12,
            "hbm_bytes": 819 * 10**9,
            "collectives": [hidden, open_one],
            "not_counted": {"sort of a/scatter-add": 2, "fusion of text/gather": 1},
            "unknown_loops": 0,
            "is_scheduled": True,
        },
    } | changes


def too_large(temporaries_only=True, part="vision tower"):
    return facts(
        fits=False,
        out_of_memory={
            "needed_bytes": 30 * GIB,
            "available_bytes": 15 * GIB,
            "temporaries_only": temporaries_only,
        },
        largest=[{"num_bytes": 5 * GIB, "shape": "f32[2,3]", "name": f"{part} forward"}],
        kept_bytes={"none": 20 * GIB, "lite": 15 * GIB, "attention": 9 * GIB, "full": GIB},
    )
