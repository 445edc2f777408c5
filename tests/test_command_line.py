"""All commands read flags, report mistakes and exit in the same way, by ``python -m`` and by ``clip-jax``."""

import errno
import importlib
import json
import logging
import pathlib
import re
import subprocess
import sys

import pytest
import trial

import clip_jax.__main__ as clip_jax_script
from clip_jax import command_line, main, plan, prepare
from clip_jax.errors import FailedError

QUICKSTART = "--config=configs/quickstart.py"
# By the name of the command: its module, arguments that can be read, and others that name a file that is not there.
COMMANDS = {
    "train": ("main", [QUICKSTART], ["--config=/nowhere.py"]),
    "predict": ("predict", ["--model=m", "--labels=a", "a.png"], ["--model=m", "--labels=a", "/nowhere.png"]),
    "evaluate": ("evaluate", ["--model=m", "--tasks=digits"], ["--model=/nowhere", "--tasks=emoji_unseen_both"]),
    "convert": ("convert", ["source", "destination"], ["/nowhere", "destination"]),
    "plan": ("plan", [QUICKSTART, "--topology=v5e:2x2"], ["--config=/nowhere.py", "--topology=v5e:2x2"]),
    "verify": ("verify", ["folder"], ["/nowhere"]),
    "prepare": ("prepare", ["bench", "emoji:noto/held_out", QUICKSTART], ["inspect", "folder:/nowhere"]),
}


@pytest.fixture(params=COMMANDS)
def name(request):
    return request.param


@pytest.fixture
def module(name):
    return importlib.import_module(f"clip_jax.{COMMANDS[name][0]}")


@pytest.fixture(params=["python -m", "clip-jax"])
def started(request, name, module):
    """The ``main`` of the command, and how it is called in its messages."""
    if request.param == "python -m":
        return module.main, f"python -m {module.__name__}"
    return (lambda argv: clip_jax_script.main([name, *argv])), f"clip-jax {name}"


def lines_on_stderr(capsys) -> list[str]:
    output, errors = capsys.readouterr()
    assert output == ""
    return errors.splitlines()


@pytest.mark.parametrize("rest_is_right", [True, False])
@pytest.mark.parametrize("flag", ["--hlep", "--hlep=3", "-hlep"])
def test_an_unknown_flag_is_refused_with_the_nearest_one(capsys, name, started, flag, rest_is_right):
    start, program = started
    arguments = COMMANDS[name][1] if rest_is_right else COMMANDS[name][1][:1] if name == "prepare" else []
    subcommand = " bench" if name == "prepare" else ""
    assert start([*arguments, flag]) == 2
    [line] = lines_on_stderr(capsys)
    assert line == f"error: unknown argument {flag}; did you mean --help? See {program}{subcommand} --help"


def test_a_flag_is_not_abbreviated(capsys, name, module):
    arguments = COMMANDS[name][1]
    flag = next((word for word in arguments if word.startswith("--")), "--help")
    short = flag.partition("=")[0][:-1]
    assert module.main([*arguments, f"{short}=x"]) == 2
    [line] = lines_on_stderr(capsys)
    assert line.startswith(f"error: unknown argument {short}=x; did you mean ")


def test_arguments_that_are_missing_are_one_line(capsys, name, started):
    start, program = started
    assert start([]) == 2
    [line] = lines_on_stderr(capsys)
    if name == "evaluate":
        assert line == "error: give one of --model, --list and --compare"
    else:
        assert line.startswith("error: the following arguments are required: ")
        assert line.endswith(f"; see {program} --help")


def test_a_file_that_is_not_there_is_one_line(capsys, name, module):
    assert module.main(COMMANDS[name][2]) == 2
    [line] = lines_on_stderr(capsys)
    assert line.startswith("error: ") and "/nowhere" in line


def test_help_names_the_command_as_it_was_started(capsys, started):
    start, program = started
    with pytest.raises(SystemExit) as ended:
        start(["--help"])
    assert ended.value.code == 0
    output, errors = capsys.readouterr()
    assert output.startswith(f"usage: {program} ") and errors == ""


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (KeyboardInterrupt(), 3, ["interrupted"]),
        (KeyboardInterrupt("start it again"), 3, ["interrupted; start it again"]),
        (ValueError("one\ntwo"), 2, ["error: one", "error: two"]),
        (ValueError(), 2, ["error: ValueError"]),
        (FileNotFoundError("no config 'x'"), 2, ["error: no config 'x'"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\nb"), 2, None),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, ["error: a: Permission denied"]),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 1, ["failed: a: No space left on device"]),
        (OSError(None, "write() failed: File too large", "a"), 1, ["failed: a: write() failed: File too large"]),
        (TimeoutError("no answer"), 1, ["failed: no answer"]),
        (FailedError("a worker has died"), 1, ["failed: a worker has died"]),
        (FloatingPointError("the loss is nan"), 1, ["failed: the loss is nan"]),
    ],
)
def test_errors_become_lines_and_exit_codes(capsys, monkeypatch, module, error, code, lines):
    monkeypatch.setattr(module, "parse_arguments", raising(error))
    assert module.main([]) == code
    assert lines_on_stderr(capsys) == (lines or ["error: a\\nb: No such file or directory"])


def test_an_error_that_is_a_fault_of_the_program_keeps_its_traceback(monkeypatch, module):
    monkeypatch.setattr(module, "parse_arguments", raising(TypeError("a fault")))
    with pytest.raises(TypeError, match="a fault"):
        module.main([])


def raising(error: BaseException):
    def parse_arguments(*_):
        raise error

    return parse_arguments


def config_of(name: str, arguments: list[str]):
    if name == "train":
        return main.parse_arguments(arguments)[0]
    if name == "plan":
        return plan.parse_arguments(arguments)[1]
    return command_line.read_config(prepare.parse_arguments(arguments))


TAKE_OVERRIDES = ("train", "plan", "prepare")


@pytest.mark.parametrize("name", TAKE_OVERRIDES)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_values_of_the_config_are_set_in_two_forms(name, first):
    overrides = ["--config.steps", "7", "--config.seed=3", "--config.optimizer.learning_rate", "1e-4"]
    overrides += ["--config.data.source", "folder:/a=b"]
    arguments, command = list(COMMANDS[name][1]), []
    if name == "prepare":
        command = [arguments.pop(0)]
    config = config_of(name, [*command, *overrides, *arguments] if first else [*command, *arguments, *overrides])
    assert (config.steps, config.seed, config.optimizer.learning_rate) == (7, 3, 1e-4)
    assert config.data.source == "folder:/a=b"


@pytest.mark.parametrize("name", TAKE_OVERRIDES)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.steps"], "error: --config.steps has no value; write --config.steps=VALUE; see "),
        (["--config.steps", "--config.seed=1"], "error: --config.steps has no value; write --config.steps=VALUE; see "),
        (["--config.steps", "x"], "error: --config.steps=x: must be a whole number"),
        (["--config.stepz", "3"], "error: --config.stepz: there is no such key; did you mean --config.steps?"),
        (["--confg.steps=3"], "error: unknown argument --confg.steps=3; did you mean --config.steps? See "),
        (["--steps=3"], "error: unknown argument --steps=3; did you mean --config.steps? See "),
    ],
)
def test_a_wrong_value_of_the_config_is_one_line(capsys, module, name, words, message):
    assert module.main([*COMMANDS[name][1], *words]) == 2
    [line] = lines_on_stderr(capsys)
    assert line.startswith(message)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - TAKE_OVERRIDES))
def test_a_command_without_a_config_refuses_its_values(capsys, module, name):
    assert module.main([*COMMANDS[name][1], "--config.steps=3"]) == 2
    [line] = lines_on_stderr(capsys)
    assert line.startswith("error: unknown argument --config.steps")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: unknown command trian; did you mean train? See clip-jax --help"),
        (["xyz", "--help"], "error: unknown command xyz; the commands are train, predict, "),
        ([], "error: no command is given; the commands are train, predict, "),
        (["--hepl"], "error: unknown argument --hepl; did you mean --help? See clip-jax --help"),
    ],
)
def test_a_command_that_does_not_exist_is_one_line(capsys, arguments, line):
    assert clip_jax_script.main(arguments) == 2
    [said] = lines_on_stderr(capsys)
    assert said.startswith(line)


def test_the_help_of_the_script_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit) as ended:
        clip_jax_script.main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: clip-jax COMMAND ...")
    assert re.findall(r"^  (\w+)  +\w.*$", output, flags=re.MULTILINE) == list(COMMANDS)


def test_setup_installs_the_script():
    setup = (trial.REPOSITORY / "setup.py").read_text(encoding="utf-8")
    module, function = re.search(r'"clip-jax = ([\w.]+):(\w+)"', setup).groups()
    assert getattr(importlib.import_module(module), function) is clip_jax_script.start


def test_modules_of_commands_are_imported_without_jax():
    """Ctrl-C cannot be caught while they are imported, and worker processes import them again."""
    modules = [f"clip_jax.{module}" for module, *_ in COMMANDS.values()] + ["clip_jax.__main__"]
    heavy = "{'jax', 'flax', 'grain', 'orbax'}"
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy} & sys.modules.keys()))"
    assert run_python("-c", program) == (0, "[]\n", "")


def test_python_m_clip_jax_is_the_script():
    code, output, errors = run_python("-m", "clip_jax", "predict", "--hlep")
    assert (code, output) == (2, "")
    expected = "error: unknown argument --hlep; did you mean --help? See python -m clip_jax predict --help\n"
    assert errors == expected


def test_the_script_starts_workers(tmp_path):
    """They import the module that was started anew; pip's scripts are files without a module's name."""
    script = tmp_path / "clip-jax"
    script.write_text(
        "import sys\nfrom clip_jax.__main__ import start\nif __name__ == '__main__':\n    sys.exit(start())\n"
    )
    out = tmp_path / "out"
    arguments = ["prepare", "convert", "emoji:noto/held_out", str(out), "--workers=2", "--pairs-per-shard=103"]
    code, output, errors = run_python(str(script), *arguments)
    assert code == 0, errors
    assert output.startswith("205 pairs, ") and "Traceback" not in errors
    assert len(json.loads((out / "manifest.json").read_text())["shards"]) == 2


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux has it")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, errors = run_python("-m", "clip_jax", "--help", stdout=full)
    assert (code, errors) == (1, "failed: standard output: No space left on device\n")


def run_python(*arguments: str, stdout=subprocess.PIPE) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=trial.REPOSITORY,
        env=trial.environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=trial.DEADLINE,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_log_is_lines_on_the_stream_that_is_there_then(capsys):
    logger = logging.getLogger("clip_jax.somewhere")
    for stream, level, printed in (("stdout", logging.INFO, ("step 1\nnote\n", "")), ("stderr", 30, ("", "note\n"))):
        command_line.set_up_logging(stream, level)
        logger.info("step %d", 1)
        logger.warning("note")
        assert tuple(capsys.readouterr()) == printed


def test_an_interrupt_in_an_import_that_executes_text_keeps_the_exit_code():
    program = (
        "from clip_jax.command_line import command, run\n"
        "def body(arguments, name): exec('raise KeyboardInterrupt')\n"
        "run(command('name')(body))"
    )
    assert run_python("-c", program)[::2] == (3, "interrupted\n")


def test_what_tensorstore_prints_of_a_full_disk_is_discarded_and_nothing_else(monkeypatch, capsys):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    command_line.set_up_logging()
    command_line.set_up_logging()

    class Careless:
        def __init__(self, message: str):
            self._message = message

        def __del__(self):
            raise RuntimeError(self._message)

    for message in ("Event loop is closed", "another error"):
        Careless(message)
    assert printed == ["another error"]


def test_a_host_without_the_others_ends_with_one_line():
    alone = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    process = trial.start(*trial.SMALL, "--startup-timeout=1", "--workdir=/nowhere", **alone)
    assert trial.finish(process).splitlines()[-1] == (
        "failed: host 1 of 2 (coordinator 127.0.0.1:1) has waited 1 s for the other hosts of the pod; start all of "
        "them, or give them more time with --startup-timeout"
    )
    assert process.returncode == 1
