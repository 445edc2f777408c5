"""The name by which the loss asks for the choices of :mod:`clip_jax.models.execution`."""

from clip_jax.models.execution import execution_on as backend_of

__all__ = ["backend_of"]
