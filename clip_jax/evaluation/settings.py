"""The config's section ``evaluation``: the tasks that a training is scored on."""

import dataclasses

from clip_jax.settings import may_change, must_be_positive


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Defaults of ``config.evaluation``: no task. A resumed run may change all of it."""

    tasks: str = may_change("")  # as --tasks of python -m clip_jax.evaluate; empty: none
    data: str = may_change("~/data")  # the folder of the tasks' data
    batch_size: int = may_change(256)  # over all devices

    def problems(self) -> list[str]:
        """One line for each value that cannot be used."""
        return must_be_positive(self, ("batch_size",), "config.evaluation")
