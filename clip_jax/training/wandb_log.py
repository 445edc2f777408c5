"""Sends a run's metrics to Weights & Biases, if ``config.logging.wandb_project`` names a project."""

import dataclasses
import importlib.util
import logging
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from clip_jax.errors import FailedError, first_line
from clip_jax.files import write_atomically
from clip_jax.settings import may_change, must_be

START_TIMEOUT = 30  # seconds for the service to answer; the training waits

logger = logging.getLogger("clip_jax")


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """Defaults of ``config.logging``: only files in the run's folder."""

    wandb_project: str = may_change("")  # of Weights & Biases; empty: off
    wandb_entity: str = may_change("")  # the user or team; empty: the default of the login

    def problems(self) -> list[str]:
        """Returns one line for each invalid value, also if the package is missing."""
        return [
            *must_be(
                not self.wandb_project or importlib.util.find_spec("wandb") is not None,
                f"config.logging.wandb_project={self.wandb_project} needs a package: pip install 'clip-jax-tpu[wandb]'",
            ),
            *must_be(
                bool(self.wandb_project) or not self.wandb_entity,
                f"config.logging.wandb_entity={self.wandb_entity} needs config.logging.wandb_project",
            ),
        ]


class WandbLog:
    """One run of Weights & Biases for all processes of a training, by an id in the run's folder.

    A killed training repeats some steps. The metrics are plotted over their own ``step``, so that their later values
    are accepted. An error of the service is logged once, and the training goes on without it.
    """

    def __init__(self, settings: LoggingSettings, workdir: epath.Path, config: dict):
        """Starts or resumes the run.

        Raises:
          FailedError: there is no login.
        """
        import wandb

        file = workdir / "wandb_id"
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex[:12])
        self._run = None
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity or None,
                id=file.read_text(),
                resume="allow",
                name=workdir.name,
                dir=str(workdir),
                config=config,
                settings=wandb.Settings(silent=True, console="off", init_timeout=START_TIMEOUT),
            )
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.UsageError as error:
            raise FailedError(
                f"Weights & Biases: {first_line(error)}; run wandb login, or set WANDB_MODE=offline"
            ) from None
        except Exception as error:  # the network, the service, a proxy: not worth ending a training for
            self._give_up(error)
        else:
            logger.info("Weights & Biases: %s", self._run.url or f"offline, in {workdir}/wandb")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends metrics of a step."""
        self._try(lambda run: run.log({"step": step, **values}))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends an image, uint8 ``[H, W, 3]``."""
        import wandb

        # Image() writes a file to the temporary folder, whose disk can be full.
        self._try(lambda run: run.log({"step": step, name: wandb.Image(image)}))

    def close(self) -> None:
        """Waits until all is sent."""
        self._try(lambda run: run.finish())

    def _try(self, send: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.warning("Weights & Biases gets nothing more until the next start: %s", first_line(error))
