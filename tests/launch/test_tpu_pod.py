"""launch/tpu_pod.sh against a recorded stand-in for gcloud, whose workers are folders with a real shell."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAND_IN = pathlib.Path(__file__).with_name("gcloud_stand_in.py")
DEADLINE = 60  # seconds for any one command; they take a fraction of one

SLICE = ("--name=pod", "--zone=us-west4-a")
REQUEST = (*SLICE, "--accelerator-type=v5litepod-16", "--spot", "--project=project")
TRAINING = ("--", "--config=configs/vit_l14.py", "--workdir=/mnt/bucket/run", "--config.data.source=csv:/it's a b.csv")
RUN = (*SLICE, "--bucket=pairs", *TRAINING)
RESUME = (*REQUEST, "--bucket=pairs", *TRAINING)

# What a worker has that this machine has not, or must not run. The Python waits for a file, as a training takes time.
WORKER_PROGRAMS = {
    "uv": '[ "$1" = venv ] && mkdir -p .venv/bin && cp ~/bin/python .venv/bin/python; echo "uv $*" >> ~/uv_calls',
    "python": "for _ in $(seq 200); do [ -e ~/finished ] && break; sleep 0.05; done\n"
    'echo "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"; printf "argument %s\\n" "$@"; exit 3',
    "mountpoint": "[ -e ~/mounted ]",
    "gcsfuse": 'echo "$*" > ~/mounted',
    "sudo": ":",
    "tail": 'PATH=/usr/bin:/bin; [ "$3" = -F ] && exec cat "$4"; exec tail "$@"',  # following would never end
}


class Cloud:
    """A copy of the repository with the script, and the stand-in's folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "cloud"
        self.repository = folder / "repository"
        self.script = self.repository / "launch" / "tpu_pod.sh"
        self.script.parent.mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "tpu_pod.sh", self.script)
        (self.repository / "constraints.txt").write_text("jax\n")
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        for words in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "--message=all")):
            subprocess.run(["git", "-C", self.repository, *words], check=True, timeout=DEADLINE)
        self._program(folder / "bin" / "gcloud", f'exec {sys.executable} -S {STAND_IN} "$@"')
        for name in ("mountpoint", "gcsfuse", "sudo", "tail"):
            self._program(self.folder / "worker_bin" / name, WORKER_PROGRAMS[name])
        self._program(self.folder / "new_worker" / ".local" / "bin" / "uv", WORKER_PROGRAMS["uv"])
        self._program(self.folder / "new_worker" / "bin" / "python", WORKER_PROGRAMS["python"])
        (self.folder / "calls").touch()
        self.queue("ACTIVE")
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "GCLOUD_STAND_IN": str(self.folder),
            "POLL_SECONDS": "0",
        }

    @staticmethod
    def _program(path: pathlib.Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def queue(self, *states: str) -> None:
        """The states that the queued resource passes through, one with each look at it; it stays in the last."""
        (self.folder / "queue").write_text(" ".join(states))

    def pod(self, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [self.script, *words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self) -> list[list[str]]:
        """What gcloud was called with since the last look."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines()
        path.write_text("")
        return [shlex.split(line) for line in lines]

    def verbs(self) -> list[str]:
        return [call[4] for call in self.calls()]

    def workers(self) -> list[pathlib.Path]:
        return sorted(self.folder.glob("worker-*"))

    def end_training(self, times: int = 1) -> list[str]:
        """Lets the training of every worker end; returns their logs, once they tell of that many ends."""
        for worker in self.workers():
            (worker / "finished").touch()
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            logs = [(worker / "clip_jax.log").read_text() for worker in self.workers()]
            if all(log.count("exit code") == times for log in logs):
                return logs
            time.sleep(0.05)
        raise AssertionError(f"no exit code in {logs}")


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for worker in cloud.workers():
        (worker / "finished").touch()  # ends what a failed test left running


@pytest.fixture
def running(cloud):
    """A slice with the training running on it."""
    cloud.pod("create", *REQUEST)
    cloud.pod("install", *SLICE)
    cloud.pod("run", *RUN)
    cloud.calls()
    return cloud


def test_create_requests_the_slice_and_waits_until_it_is_active(cloud):
    cloud.queue("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cloud.pod("create", *REQUEST)
    request, *looks = cloud.calls()
    assert request == shlex.split(
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-west4-a --project=project"
        " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert [look[4] for look in looks] == ["describe"] * 3
    assert "pod is PROVISIONING; waiting" in done.stderr


@pytest.mark.parametrize("accelerator_type", ["v4-8", "v5litepod-256", "v5p-512", "v6e-64"])
def test_each_generation_gets_the_image_that_is_made_for_it(cloud, accelerator_type):
    cloud.pod("create", *SLICE, f"--accelerator-type={accelerator_type}")  # the stand-in refuses any other


def test_the_network_and_the_service_account_are_passed_on(cloud):
    given = ["--network=net", "--subnetwork=sub", "--service-account=a@b.iam.gserviceaccount.com"]
    cloud.pod("create", *REQUEST, *given)
    assert set(given) < set(cloud.calls()[0])


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_gives_up_on_a_request_that_cannot_become_active(cloud, state):
    cloud.queue("WAITING_FOR_RESOURCES", state)
    assert f"error: pod is {state}; 'resume' requests it again" in cloud.pod("create", *REQUEST, code=1).stderr


def test_install_brings_the_last_commit_and_a_newer_python_to_every_worker(cloud):
    cloud.pod("create", *REQUEST)
    (cloud.repository / "constraints.txt").write_text("not committed\n")
    cloud.pod("install", *SLICE)
    assert len(cloud.workers()) == 2
    for worker in cloud.workers():
        assert (worker / "clip_jax" / "constraints.txt").read_text() == "jax\n"
        venv, packages = (worker / "uv_calls").read_text().splitlines()
        assert "--python=3.12" in venv
        assert packages.endswith("--constraint=constraints.txt --editable .[tpu]")


def test_run_starts_the_training_on_every_worker_and_comes_back_at_once(running):
    logs = running.end_training()
    arguments = ["-m", "clip_jax.main", "--distributed", *TRAINING[1:]]
    for log in logs:
        assert re.findall("argument (.*)", log) == arguments
        assert log.endswith("exit code 3\n")


def test_run_mounts_the_bucket_once(running):
    assert all((worker / "mounted").read_text().endswith("pairs /mnt/bucket\n") for worker in running.workers())
    running.end_training()
    for worker in running.workers():
        (worker / "mounted").write_text("kept")
    running.pod("run", *RUN)
    assert all((worker / "mounted").read_text() == "kept" for worker in running.workers())


def test_run_passes_the_flags_of_libtpu_to_the_workers(cloud):
    cloud.pod("create", *REQUEST)
    cloud.pod("install", *SLICE)
    cloud.pod("run", *RUN, LIBTPU_INIT_ARGS="--one=1 --two='2'")
    assert all("LIBTPU_INIT_ARGS=--one=1 --two='2'\n" in log for log in cloud.end_training())


def test_run_refuses_to_start_while_a_training_runs(running):
    done = running.pod("run", *RUN, code=1)
    assert "a training runs on" in done.stdout
    assert running.verbs() == ["ssh"]  # asked, and nothing started


def test_run_reports_that_nothing_is_installed(cloud):
    cloud.pod("create", *REQUEST)
    assert "not installed" in cloud.pod("run", *RUN, code=1).stdout


def test_log_follows_the_first_worker(running):
    running.end_training()
    (running.workers()[1] / "clip_jax.log").write_text("of the second worker")
    done = running.pod("log", *SLICE)
    assert "exit code 3" in done.stdout and "second" not in done.stdout
    (call,) = running.calls()
    assert "--worker=0" in call and "--command=tail -n 100 -F ~/clip_jax.log" in call


def test_status_prints_the_state_and_whether_each_worker_runs(running):
    lines = running.pod("status", *SLICE).stdout.splitlines()
    assert lines[0] == "pod is ACTIVE" and lines.count("running") == 2
    running.end_training()
    lines = running.pod("status", *SLICE).stdout.splitlines()
    assert lines[1:] == ["not running", "exit code 3"] * 2


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_resume_after_preemption_replaces_the_slice_and_runs_the_same_command(running, state):
    running.end_training()
    running.queue("SUSPENDING", state, "WAITING_FOR_RESOURCES", "ACTIVE")
    running.pod("resume", *RESUME)
    wanted = "describe describe delete create describe describe scp ssh ssh ssh"
    assert running.verbs() == wanted.split()
    assert all(f"argument {TRAINING[-1]}" in log for log in running.end_training())


def test_resume_requests_a_slice_that_is_gone(cloud):
    cloud.pod("resume", *RESUME)
    assert cloud.verbs() == ["describe", "create", "describe", "scp", "ssh", "ssh", "ssh"]


def test_resume_does_not_touch_a_training_that_runs(running):
    assert "nothing to resume" in running.pod("resume", *RESUME).stderr
    assert running.verbs() == ["describe", "ssh"]


def test_resume_starts_again_on_a_slice_that_is_still_there(running):
    running.end_training()
    running.pod("resume", *RESUME)
    assert running.verbs() == ["describe", "ssh", "ssh"]
    running.end_training(times=2)


def test_resume_waits_for_a_request_that_is_in_the_queue(cloud):
    cloud.queue("WAITING_FOR_RESOURCES")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([cloud.script, "create", *REQUEST], env=cloud.environment, capture_output=True, timeout=1)
    cloud.calls()
    cloud.queue("PROVISIONING", "PROVISIONING", "ACTIVE")
    cloud.pod("resume", *RESUME)
    assert cloud.verbs() == ["describe", "describe", "describe", "scp", "ssh", "ssh", "ssh"]


def test_resume_deletes_nothing_when_the_state_cannot_be_read(running):
    (running.folder / "offline").touch()
    done = running.pod("resume", *RESUME, code=1)
    assert "auth tokens" in done.stderr and "the state of pod cannot be read" in done.stderr
    assert running.verbs() == ["describe"]


def test_delete_deletes_the_slice_without_asking(running):
    running.end_training()
    running.pod("delete", *SLICE)
    assert running.calls() == [
        shlex.split("gcloud compute tpus queued-resources delete pod --zone=us-west4-a --force --quiet")
    ]
    assert not (running.folder / "slice.json").exists()


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ((), ("create", *REQUEST)),
        (("create",), ("install", *SLICE)),
        (("create", "install"), ("run", *RUN)),
        (("create", "install", "run"), ("log", *SLICE)),
        (("create", "install", "run"), ("status", *SLICE)),
        (("create", "install", "suspend"), ("resume", *RESUME)),
        (("create",), ("delete", *SLICE)),
    ],
    ids=lambda value: value[0] if value else "",
)
def test_a_dry_run_prints_the_commands_that_the_real_run_runs(cloud, before, words):
    for step in before:
        if step == "suspend":
            cloud.queue("SUSPENDED", "ACTIVE")
        else:
            cloud.pod(step, *(RESUME if step == "run" else REQUEST))
    cloud.calls()
    cut = words.index("--") if "--" in words else len(words)
    printed = cloud.pod(*words[:cut], "--dry-run", *words[cut:])
    assert cloud.calls() == [] and printed.stderr == ""
    done = cloud.pod(*words)
    shown = [line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert printed.stdout.splitlines() == shown
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert [command for command in commands if command[0] == "gcloud"] == cloud.calls()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no command"),
        (("start", *SLICE), "unknown command start"),
        (("create", "--zone=z", "--accelerator-type=v4-8"), "--name=NAME is missing"),
        (("create", "--name=pod", "--accelerator-type=v4-8"), "--zone=ZONE is missing"),
        (("create", "--name=My_Pod", "--zone=z", "--accelerator-type=v4-8"), "--name=My_Pod must be"),
        (("create", *SLICE), "--accelerator-type=TYPE is missing"),
        (("create", *SLICE, "--accelerator-type=v5e-16"), "unknown accelerator type v5e-16; known are"),
        (("create", *SLICE, "--accelerator-type"), "--accelerator-type has no value"),
        (("create", *REQUEST, "--preemptible"), "unknown argument --preemptible"),
        (("create", *REQUEST, *TRAINING), "create takes nothing after --"),
        (("run", *SLICE), "no --config=FILE after --"),
        (("run", *SLICE, "--", "--config=configs/vit_l14.py"), "no --workdir=/FOLDER after --"),
        (("run", *SLICE, "--", "--config=c", "--workdir=gs://pairs/run"), "no --workdir=/FOLDER after --"),
        (("run", *SLICE, "--", "--config=c", "--workdir=/mnt/bucket/run"), "--bucket=BUCKET"),
        (("run", *SLICE, "--bucket=gs://pairs", *TRAINING), "--bucket=gs://pairs must be"),
        (("resume", *SLICE, *TRAINING), "--accelerator-type=TYPE is missing"),
    ],
)
def test_a_mistake_is_reported_in_one_line_before_anything_is_called(cloud, words, message):
    done = cloud.pod(*words, code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert done.stdout == "" and cloud.calls() == []


def test_the_stand_in_refuses_what_gcloud_would(cloud):
    create = "gcloud compute tpus queued-resources create pod --zone=z --node-id=pod --runtime-version=v2-alpha-tpuv5"
    for line in (
        create,  # no accelerator type
        create + " --accelerator-type=v5p-8 --preemptible",
        "gcloud compute tpus queued-resources delete pod --force",  # no zone
        "gcloud compute tpus tpu-vm ssh pod --zone=z --workers=all --command=ls",
        "gcloud compute tpus tpu-vm run pod --zone=z",
    ):
        done = subprocess.run(shlex.split(line), env=cloud.environment, capture_output=True, timeout=DEADLINE)
        assert done.returncode == 2, line


def test_the_commands_of_the_documentation_are_well_formed(cloud):
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8").replace("\\\n", " ")
    text = text.replace("=BUCKET", "=pairs").replace('"${pod[@]}"', shlex.join([*REQUEST, "--bucket=pairs"]))
    text = text.replace('"${training[@]}"', shlex.join(TRAINING[1:]))
    lines = re.findall(r"^ *(?:until )?launch/tpu_pod\.sh (\w+)([^|\n]*)", text, flags=re.MULTILINE)
    assert {command for command, _ in lines} == {"create", "install", "run", "log", "status", "resume", "delete"}
    for command, rest in lines:
        cloud.pod(command, "--dry-run", *shlex.split(rest, comments=True))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", ROOT / "launch" / "tpu_pod.sh"], check=True, timeout=DEADLINE)
