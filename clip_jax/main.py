"""Trains a CLIP model.

    python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.steps=100 ...]

Exit codes: 0 finished, 1 failed, 2 a mistake in what was asked for (one line each), 3 interrupted and saved. A host
that leaves since another one of its pod is gone has failed, too; the same command on all hosts goes on with the run.
"""

import argparse
import logging
import os
import sys
import traceback

import absl.logging
import ml_collections

from clip_jax.config import load_config_file, override, validate
from clip_jax.data.bad_samples import TooManyBadSamplesError
from clip_jax.data.pipeline import InputError
from clip_jax.standard_output import run

POD_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def parse_arguments(argv: list[str]) -> tuple:
    """Returns the config with its overrides, the folder of the run, and whether to start jax.distributed.

    Raises:
      ValueError, FileNotFoundError: a flag is unknown or its value is not of its type, or the config is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.main",
        description="Trains a CLIP model. Any value of the config can be set: --config.global_batch_size=512",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a config file, such as configs/quickstart.py")
    parser.add_argument(
        "--workdir",
        type=os.path.expanduser,  # a shell leaves the ~ of --workdir=~/run alone
        help="the folder of the run; runs/NAME_OF_CONFIG if not given",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other hosts of a pod; needed on Cloud TPU VMs only",
    )
    try:
        known, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    config = load_config_file(known.config)
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config."):
            raise ValueError(f"unknown argument {word}; the config's values are set with --config.NAME=VALUE")
        if not equals:
            value = next(words, None)
            if value is None:
                raise ValueError(f"{name} has no value; write {name}=VALUE")
        override(config, name.removeprefix("--config."), value)
    name = os.path.splitext(os.path.basename(known.config))[0]
    return config, known.workdir or f"runs/{name}", known.distributed


def start_distributed(asked_for: bool) -> bool:
    """Joins the pod if asked to, or if the environment shows one; must come before anything touches a device.

    Returns whether it did.

    Raises:
      ValueError: the environment names a pod only in part.
    """
    import jax

    given = [name for name in POD_VARIABLES if name in os.environ]
    if given:
        if len(given) < len(POD_VARIABLES):
            missing = ", ".join(name for name in POD_VARIABLES if name not in given)
            raise ValueError(f"{', '.join(given)} is set, but not {missing}; a pod needs all three")
        address, processes, index = (os.environ[name] for name in POD_VARIABLES)
        if not (processes.isdigit() and index.isdigit()):
            raise ValueError(f"{POD_VARIABLES[1]}={processes} and {POD_VARIABLES[2]}={index} must be numbers")
        jax.distributed.initialize(address, int(processes), int(index))
    elif asked_for or _several_processes():
        jax.distributed.initialize()  # JAX finds the others by what started them
    return jax.distributed.is_initialized()


def _several_processes() -> bool:
    """Whether GKE's, Slurm's or Open MPI's variables show more than one process."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several_hosts = "," in tpu_hosts and " " not in tpu_hosts  # libtpu may leave a sentence there
    return several_hosts or any(count.isdigit() and int(count) > 1 for count in counts)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config, workdir, distributed = parse_arguments(arguments)
        validate(config)
        in_a_pod = start_distributed(distributed)
    except (ValueError, OSError) as error:
        return _mistake(error)
    # Imported late: the workers that decode pictures import this module anew, and need neither model nor device.
    from clip_jax.training.pod import Watch

    watch, together = Watch(workdir) if in_a_pod else None, False
    try:
        code = _train(config, workdir, arguments)
        together = code in (0, 3)
    except KeyboardInterrupt:
        print("interrupted; what the last checkpoint holds is safe", file=sys.stderr)
        code = 3
    except Exception as error:
        if watch is None:
            raise
        watch.await_verdict(error)
        traceback.print_exc()
        code = 1
    return watch.leave(code, together) if watch else code


def _train(config: ml_collections.ConfigDict, workdir: str, arguments: list[str]) -> int:
    _log_to_console()
    from clip_jax.run_folder import CheckpointError
    from clip_jax.training.loop import train
    from clip_jax.training.preparation import prepare

    try:
        run = prepare(config, workdir, arguments)
    except (ValueError, OSError) as error:
        return _mistake(error)
    try:
        return 0 if train(run) else 3
    except (FloatingPointError, InputError, TooManyBadSamplesError, CheckpointError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _mistake(error: Exception) -> int:
    for line in (str(error) or type(error).__name__).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _log_to_console() -> None:
    """Our log goes to standard output, from the first host only; warnings come from all."""
    import jax

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("clip_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    # orbax warns of every option that follows from another, and prints the traceback of whatever it also raises.
    absl.logging.set_verbosity(absl.logging.FATAL)


if __name__ == "__main__":
    run(main)
