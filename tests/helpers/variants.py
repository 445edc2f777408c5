"""Trains a tiny model in every way that must make no difference; one process of a pod, or all there is of it.

    python tests/helpers/variants.py RESULTS VARIANT...

The first process writes what each variant came to into the folder RESULTS.
"""

import pathlib
import pickle
import sys
from typing import NamedTuple

STEPS = 20


class Variant(NamedTuple):
    """``function`` tells those apart that do differ: the loss that is trained, and whether patches are left out."""

    mesh: tuple[int, int]
    form: str
    accumulation_steps: int
    remat: str
    function: str = "softmax"

    @property
    def name(self) -> str:
        data, fsdp = self.mesh
        return f"{data}x{fsdp}-{self.form}-{self.accumulation_steps}-{self.remat}-{self.function}"


def variant_of(name: str) -> Variant:
    mesh, form, accumulation_steps, remat, function = name.split("-")
    data, fsdp = mesh.split("x")
    return Variant((int(data), int(fsdp)), form, int(accumulation_steps), remat, function)


def train(variant: Variant):
    """Losses and parameters after 20 steps; with fewer devices than there are, on the first of them."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh
    from tiny_training import losses_and_parameters, tiny_config

    config = tiny_config()
    config.model.text.num_layers = 1  # two in the other tower
    config.accumulation_steps = variant.accumulation_steps
    config.loss.form, config.loss.block_size = variant.form, 3  # which divides no device's share
    config.loss.kind = "sigmoid" if variant.function == "sigmoid" else "softmax"
    config.model.remat = variant.remat
    config.model.patch_dropout = 0.5 if variant.function == "dropout" else 0.0
    devices = np.array(jax.devices()[: variant.mesh[0] * variant.mesh[1]]).reshape(variant.mesh)
    return losses_and_parameters(config, Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2), STEPS)


def main() -> None:
    import jax

    from clip_jax.command_line import start_distributed

    start_distributed(asked_for=False)
    folder = pathlib.Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = train(variant_of(name))
        if jax.process_index() == 0:
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
