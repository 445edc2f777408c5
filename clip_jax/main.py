"""Trains a CLIP model.

    python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.steps=100 ...]

Exit codes: 0 finished, 1 failed, 2 a mistake in flags, config or data (one line each), 3 interrupted and saved. A host
that ends because another host of its pod is gone also returns 1. The same command on all hosts resumes the run.
"""

from clip_jax.training.interruption import Interruption, catch_signals, signals_caught

if __name__ == "__main__":
    catch_signals()  # before the other imports, which take longer than Python's own start

import argparse
import contextlib
import logging
import os
import traceback
from typing import TYPE_CHECKING

from clip_jax.command_line import (
    DONE,
    FAILED,
    INTERRUPTED,
    OVERRIDE,
    Parser,
    command,
    read_config,
    report,
    report_error,
    report_interrupt,
    run,
    set_up_logging,
    start_distributed,
)
from clip_jax.errors import FailedError, reason

if TYPE_CHECKING:
    import ml_collections

PROGRAM = "python -m clip_jax.main"


def parse_arguments(
    argv: list[str], program: str = PROGRAM
) -> tuple["ml_collections.ConfigDict", str, argparse.Namespace]:
    """Returns the config with its overrides, the folder of the run, and the other flags.

    Raises:
      ValueError, FileNotFoundError: a flag is unknown or its value is not of its type, or the config is missing.
    """
    parser = Parser(
        prog=program,
        description="Trains a CLIP model. Any value of the config can be set: --config.global_batch_size=512",
    )
    parser.add_config("configs/quickstart.py")
    parser.add_argument(
        "--workdir",
        type=os.path.expanduser,  # a shell does not expand the ~ of --workdir=~/run
        help="the folder of the run; runs/NAME_OF_CONFIG if not given",
    )
    parser.add_argument(
        "--profile", default="", metavar="START:STOP", help="trace the steps after START up to STOP, to WORKDIR/profile"
    )
    parser.add_argument(
        "--from-step", type=int, metavar="N", help="go on from the checkpoint of this step instead of the newest"
    )
    parser.add_argument(
        "--allow-changed",
        type=lambda text: tuple(filter(None, text.removeprefix(OVERRIDE).split(","))),
        default=(),
        metavar="KEY,KEY",
        help="keys of the config that the run goes on with changed values of, such as optimizer.learning_rate",
    )
    parser.add_distributed()
    arguments = parser.read(argv)
    name = os.path.splitext(os.path.basename(arguments.config))[0]
    return read_config(arguments), arguments.workdir or f"runs/{name}", arguments


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    with signals_caught() as interruption:
        code = _main(argv, program, interruption)
        interruption.ignore()
    if interruption.requested and code == DONE:
        code = report_interrupt("all steps are done and the report is written")
    return code


def _main(argv: list[str], program: str, interruption: Interruption) -> int:
    config, workdir, flags = parse_arguments(argv, program)
    from clip_jax.config import validate

    validate(config)
    watch, together = None, False
    if start_distributed(flags.distributed, flags.startup_timeout):
        from clip_jax.training.pod import Watch

        interruption.join_pod()
        watch = Watch(workdir)
        interruption.before_exit = watch.announce_interruption
    try:
        code = _train(config, workdir, flags, argv, interruption)
        together = code in (DONE, INTERRUPTED)
    except (KeyboardInterrupt, Exception) as error:  # also a ValueError: in training it is an error in this program
        if isinstance(error, KeyboardInterrupt) or interruption.ends_now:  # XLA makes errors of its own of it
            interruption.announced = True
            code = report_interrupt("what the last checkpoint holds is safe")
            if watch:
                watch.leave_interrupted()
        else:
            if watch:
                watch.exit_if_host_gone(error)
            traceback.print_exc()
            code = FAILED
    return watch.leave(code, together) if watch else code


def _train(
    config: "ml_collections.ConfigDict",
    workdir: str,
    flags: argparse.Namespace,
    arguments: list[str],
    interruption: Interruption,
) -> int:
    import jax

    # Only the first host logs information; all hosts log warnings.
    set_up_logging("stdout", logging.INFO if jax.process_index() == 0 else logging.WARNING)
    from clip_jax.training.folder_lock import claimed
    from clip_jax.training.loop import train
    from clip_jax.training.preparation import Resumption, prepare
    from clip_jax.training.profiling import check_profile, parse_profile

    with contextlib.ExitStack() as stack:
        try:
            profile = parse_profile(flags.profile)
            run = prepare(config, workdir, arguments, Resumption(flags.from_step, flags.allow_changed))
            check_profile(profile, run.steps)
            stack.enter_context(claimed(run.workdir))
        except Exception as error:
            code = None if interruption.ends_now else report_error(error)
            if code is None:
                raise
            return code
        try:
            return DONE if train(run, interruption, profile) else INTERRUPTED
        except (FailedError, FloatingPointError, OSError) as error:
            if interruption.ends_now:
                raise
            report("failed", reason(error))
            return FAILED


if __name__ == "__main__":
    run(main)
