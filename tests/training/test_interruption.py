"""A signal ends a training at once if there is nothing to save; else it is recorded for the loop to save and stop."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from clip_jax.training.interruption import Interruption, signals_caught

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@BOTH
def test_a_signal_raises_where_there_is_nothing_to_save(number):
    with signals_caught() as interruption:
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert interruption.ends_now


@BOTH
def test_a_deferred_signal_is_recorded(number):
    with signals_caught() as interruption:
        interruption.defer()
        send(number)
        assert interruption.requested and not interruption.ends_now


def test_a_second_signal_of_the_other_kind_raises_nothing():
    with signals_caught():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGTERM)


def test_the_handlers_before_are_there_again():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
    with signals_caught():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_outside_of_the_main_thread_no_signal_is_caught():
    found = []
    thread = threading.Thread(target=lambda: found.append(_caught()))
    thread.start()
    thread.join()
    assert found == [False]


def _caught() -> bool:
    with signals_caught() as interruption:
        return signal.getsignal(signal.SIGTERM) == interruption._handle


def test_an_interrupt_that_a_callback_discards_is_raised_again(capsys):
    def callback(phase: str, info: dict) -> None:
        if phase == "start" and not sent:
            sent.append(True)
            send(signal.SIGTERM)

    sent = []
    with signals_caught():
        gc.callbacks.append(callback)
        try:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                gc.collect()
                time.sleep(1)
        finally:
            gc.callbacks.remove(callback)
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_of_callbacks_go_to_the_hook_before(monkeypatch):
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: errors.append(str(unraisable.exc_value)))

    class Careless:
        def __del__(self):
            raise RuntimeError("an error of a callback")

    with signals_caught():
        Careless()
    assert errors == ["an error of a callback"]


def ended(program: str, *numbers: int) -> tuple[int, str]:
    """Sends signals to a Python program once it prints; returns its exit code and the rest of its output."""
    lines = f"import hashlib, time\nfrom clip_jax.training import interruption\n{program}"
    process = subprocess.Popen(
        [sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process.stdout.readline()
    time.sleep(0.2)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    return process.wait(30), process.stdout.read()


def test_a_signal_during_the_imports_ends_the_process_with_code_3():
    program = "interruption.catch_signals(); print('here', flush=True); time.sleep(20)"
    assert ended(program, signal.SIGTERM) == (3, "interrupted\n")


@BOTH
def test_a_main_thread_that_does_not_react_is_ended(number):
    # Handlers run in the main thread between two of its instructions. This one takes minutes, in C.
    program = (
        "interruption.PATIENCE = 0.5\n"
        "with interruption.signals_caught() as caught:\n"
        "    print('here', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    assert ended(program, number) == (3, "interrupted; what the last checkpoint holds is safe\n")


def test_a_second_signal_ends_a_training_that_waits_to_save():
    program = (
        "with interruption.signals_caught() as caught:\n"
        "    caught.defer(); print('here', flush=True)\n"
        "    while True: time.sleep(1)"
    )
    code, output = ended(program, signal.SIGTERM, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert output == "interrupted twice: nothing was saved; the last checkpoint is safe\n"


def test_nothing_ends_a_training_that_saves_for_long(monkeypatch):
    monkeypatch.setattr("clip_jax.training.interruption.PATIENCE", 0.1)
    ends = []
    monkeypatch.setattr(Interruption, "_exit", lambda *arguments: ends.append(arguments))
    with signals_caught() as interruption:
        interruption.defer()
        send(signal.SIGTERM)
        time.sleep(0.3)
    assert not ends
