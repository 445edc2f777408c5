"""Stands in for ``gcloud``: checks every call against the documented syntax, records it, and plays a small cloud.

The table below was recorded from the reference pages of ``gcloud compute tpus queued-resources`` create, describe,
delete and list, and of ``gcloud compute tpus tpu-vm`` ssh and scp. A call that they would refuse ends with code 2. The
folder in ``GCLOUD_STAND_IN`` is the cloud: ``calls`` has a call a line, ``slice.json`` the queued resource, ``queue``
the states that it still passes through, one with each look at it, and ``worker-N/`` is what a worker has in its home.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

WIDE_VALUES = {"--account", "--billing-project", "--configuration", "--format", "--project", "--verbosity"}
WIDE_SWITCHES = {"--quiet", "--help", "--log-http"}
SSH_VALUES = {"--ssh-key-file", "--strict-host-key-checking", "--worker", "--zone", "--ssh-key-expire-after"}
SSH_SWITCHES = {"--dry-run", "--force-key-file-overwrite", "--internal-ip", "--plain"}

# Each with its flags that take a value, its switches, the groups of which one flag must be there, and its positionals.
COMMANDS = {
    "queued-resources create": (
        {"--accelerator-type", "--topology", "--type", "--runtime-version", "--node-id", "--node-count"}
        | {"--node-prefix", "--boot-disk", "--data-disk", "--description", "--labels", "--metadata", "--network"}
        | {"--metadata-from-file", "--range", "--scopes", "--service-account", "--subnetwork", "--tags", "--zone"}
        | {"--valid-after-duration", "--valid-after-time", "--valid-until-duration", "--valid-until-time"},
        {"--async", "--guaranteed", "--internal-ips", "--reserved", "--shielded-secure-boot", "--spot"},
        [{"--zone"}, {"--runtime-version"}, {"--accelerator-type", "--topology"}, {"--node-id", "--node-count"}],
        1,
    ),
    "queued-resources describe": ({"--zone"}, set(), [{"--zone"}], 1),
    "queued-resources delete": ({"--zone"}, {"--async", "--force"}, [{"--zone"}], 1),
    "queued-resources list": ({"--zone", "--filter", "--limit", "--sort-by"}, set(), [{"--zone"}], 0),
    "tpu-vm ssh": (SSH_VALUES | {"--command", "--output-directory", "--ssh-flag"}, SSH_SWITCHES, [{"--zone"}], 1),
    "tpu-vm scp": (SSH_VALUES | {"--scp-flag"}, SSH_SWITCHES | {"--compress", "--recurse"}, [{"--zone"}], 2),
}

# From the page of TPU software versions: the one for JAX on each generation.
RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

CLOUD = pathlib.Path(os.environ["GCLOUD_STAND_IN"])
SLICE = CLOUD / "slice.json"


def refuse(message: str, code: int = 1) -> None:
    sys.exit(print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr) or code)


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positionals and its flags; ends the program where gcloud would refuse the call."""
    if words[:2] != ["compute", "tpus"] or " ".join(words[2:4]) not in COMMANDS:
        refuse(f"Invalid choice: {' '.join(words[:4])!r}.", 2)
    command = " ".join(words[2:4])
    values, switches, required, positionals_wanted = COMMANDS[command]
    positionals, flags = [], {}
    for word in words[4:]:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            positionals.append(word)
        elif name in values | WIDE_VALUES and equals and value:
            flags[name] = value
        elif word in switches | WIDE_SWITCHES:
            flags[name] = ""
        else:
            refuse(f"unrecognized arguments: {word}", 2)
    for group in required:
        if len(group & flags.keys()) != 1:
            refuse(f"Exactly one of ({' | '.join(sorted(group))}) must be specified.", 2)
    if len(positionals) != positionals_wanted:
        refuse(f"{command} takes {positionals_wanted} positional arguments, not {positionals}", 2)
    return command, positionals, flags


def read_slice(name: str) -> dict:
    found = json.loads(SLICE.read_text()) if SLICE.exists() else {}
    if found.get("name") != name:
        refuse(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found.")
    return found


def create(name: str, flags: dict[str, str]) -> None:
    if SLICE.exists():
        refuse(f"ALREADY_EXISTS: Resource '{name}' already exists.")
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", flags["--node-id"]):
        refuse("INVALID_ARGUMENT: node id")
    generation = flags["--accelerator-type"].split("-")[0]
    if RUNTIME_VERSIONS.get(generation) != flags["--runtime-version"]:
        refuse(f"INVALID_ARGUMENT: {flags['--runtime-version']} is not for {generation}")
    for folder in CLOUD.glob("worker-*"):
        shutil.rmtree(folder)  # the new machines know nothing of the old ones
    for index in range(2):
        shutil.copytree(CLOUD / "new_worker", CLOUD / f"worker-{index}")
    SLICE.write_text(json.dumps({"name": name, "state": "ACCEPTED"}))


def describe(name: str, flags: dict[str, str]) -> None:
    if (CLOUD / "offline").exists():
        refuse("There was a problem refreshing your current auth tokens")
    found = read_slice(name)
    if flags.get("--format") != "value(state.state)":
        refuse("this stand-in prints no other format")
    queue = (CLOUD / "queue").read_text().split()
    if queue:
        found["state"] = queue[0]
        (CLOUD / "queue").write_text(" ".join(queue[1:]))
        SLICE.write_text(json.dumps(found))
    print(found["state"])


def delete(name: str, flags: dict[str, str]) -> None:
    found = read_slice(name)
    if "--quiet" not in flags:
        refuse("would ask whether to go on")
    if "--force" not in flags and found["state"] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
        refuse(f"FAILED_PRECONDITION: {name} is {found['state']}")
    SLICE.unlink()


def workers_of(name: str, flags: dict[str, str]) -> list[pathlib.Path]:
    if read_slice(name)["state"] != "ACTIVE":
        refuse(f"TPU {name} is not in the READY state")
    which = flags.get("--worker", "0")
    return sorted(CLOUD.glob("worker-*")) if which == "all" else [CLOUD / f"worker-{which}"]


def ssh(name: str, flags: dict[str, str]) -> None:
    """Runs the command in each worker's home by a real shell, with stand-ins for what only a worker has."""
    codes = []
    for worker in workers_of(name, flags):
        environment = {"HOME": str(worker), "PATH": f"{CLOUD / 'worker_bin'}:{os.environ['PATH']}"}
        codes.append(
            subprocess.run(["bash", "-c", flags["--command"]], cwd=worker, env=environment, timeout=30).returncode
        )
    sys.exit(next((code for code in codes if code), 0))  # as gcloud does: the first failure counts


def scp(source: str, target: str, flags: dict[str, str]) -> None:
    name, _, path = target.partition(":")
    for worker in workers_of(name, flags):
        shutil.copy(source, worker / path)


def main() -> None:
    with open(CLOUD / "calls", "a", encoding="utf-8") as calls:
        calls.write(shlex.join(["gcloud", *sys.argv[1:]]) + "\n")
    command, positionals, flags = parse(sys.argv[1:])
    function = {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[command.split()[1]]
    function(*positionals, flags)


if __name__ == "__main__":
    main()
