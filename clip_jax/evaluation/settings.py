"""Declares the config section ``evaluation``: the tasks that a model is scored on during training."""

import dataclasses

from clip_jax.settings import may_change, must_be_positive


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The values of ``config.evaluation``. By default there are no tasks. A resumed run may change all values."""

    tasks: str = may_change("")  # as --tasks of clip_jax.evaluate; empty: none
    data: str = may_change("~/data")  # the folder of data sets
    batch_size: int = may_change(256)  # images or texts in a batch, over all devices

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
        return must_be_positive(self, ("batch_size",), "config.evaluation")
