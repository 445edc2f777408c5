"""Plants the faults of faults.toml, one at a time, and reports which tests catch each.

Each fault is planted in a copy of the repository. The tests of its own level run first. If they pass, all others run.
A fault that no test catches is a survivor, and the exit code is then 1.

    python tests/mutation                       all faults; hours
    python tests/mutation --only=losses/ --own  the faults in clip_jax/losses, with the tests of their own level
    python tests/mutation --tree=FOLDER         the same in another version of the repository
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
DEADLINE = 1800  # seconds for the tests of a level, and for all tests


class Fault(NamedTuple):
    """A fault: in ``file``, below ``clip_jax/``, the text ``right`` becomes ``wrong``."""

    file: str
    right: str
    wrong: str
    tests: list[str]


class Outcome(NamedTuple):
    """``caught`` has the tests that failed; ``by`` is "own level", "other tests" or "" for a survivor."""

    caught: list[str]
    by: str
    seconds: float


def read_faults(only: str) -> list[Fault]:
    """Returns the faults whose file, or whose right text, contains ``only``."""
    with (pathlib.Path(__file__).parent / "faults.toml").open("rb") as stream:
        by_file = tomllib.load(stream)
    faults = [
        Fault(file, right, wrong, [f"tests/{name}" for name in entry["tests"].split()])
        for file, entry in by_file.items()
        for right, wrong in entry["faults"]
    ]
    return [fault for fault in faults if only in fault.file or only in fault.right]


def locate(fault: Fault, tree: pathlib.Path) -> pathlib.Path:
    """Returns the file that has the right text once: the fault's own, or in an older version any other.

    Raises:
      LookupError: no file has it, or several have.
    """
    own = tree / "clip_jax" / fault.file
    for files in ([own] if own.exists() else [], sorted((tree / "clip_jax").rglob("*.py"))):
        counts = {file: file.read_text().count(fault.right) for file in files}
        if sum(counts.values()) == 1:
            return next(file for file, count in counts.items() if count)
    raise LookupError(f"{fault.right!r} occurs {sum(counts.values())} times")


def run_tests(tree: pathlib.Path, tests: list[str], *options: str) -> list[str]:
    """Runs tests in the tree, without the slow ones, and returns those that failed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *options, *tests],
        cwd=tree,
        env=os.environ
        | {
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(tree.parent / "compiled"),  # most programs are not changed by a fault
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return [f"no end after {DEADLINE} s"]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if process.returncode and not failed:
        return [output.strip().splitlines()[-1]]
    return failed


def try_fault(fault: Fault, tree: pathlib.Path, whole: bool, names: int) -> Outcome:
    """Plants the fault in the tree, runs the tests and removes the fault."""
    started = time.monotonic()
    path = locate(fault, tree)
    text = path.read_text()
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        own = [name for name in fault.tests if (tree / name).exists()]
        own = own or [f"tests/{path.relative_to(tree / 'clip_jax').parts[0]}"]  # an older version has other files
        caught = run_tests(tree, own, f"--maxfail={names}")
        by = "own level" if caught else ""
        if whole and not caught:
            others = [f"--deselect={name}" for name in own]
            caught = run_tests(tree, ["tests"], "--ignore=tests/peers", "--maxfail=1", *others)
            by = "other tests" if caught else ""
    finally:
        path.write_text(text)
    return Outcome(caught, by, time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or text contains this")
    parser.add_argument("--own", action="store_true", help="only the tests of the fault's own level")
    parser.add_argument("--names", type=int, default=3, help="how many failing tests to name before the run ends")
    parser.add_argument("--tree", type=pathlib.Path, default=REPOSITORY, help="the version of the repository to test")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="faults at a time")
    options = parser.parse_args()
    faults, lock = read_faults(options.only), threading.Lock()
    results = collections.Counter()

    with tempfile.TemporaryDirectory(prefix="clip_jax_mutation_") as folder:
        free = [pathlib.Path(folder) / str(worker) for worker in range(options.workers)]
        for tree in free:
            shutil.copytree(options.tree, tree, ignore=NOT_COPIED, symlinks=True)
            subprocess.run(["git", "init", "--quiet", tree], check=True)  # some tests list the files of the repository

        def one(fault: Fault) -> None:
            with lock:
                tree = free.pop()
            try:
                caught, by, seconds = try_fault(fault, tree, not options.own, options.names)
                verdict = f"caught by {by}: {', '.join(caught)}" if caught else "SURVIVED"
            except LookupError as error:
                by, seconds, verdict = "not in this version", 0.0, f"not in this version: {error}"
            with lock:
                free.append(tree)
                results[by or "survived"] += 1
                print(f"{fault.file}: {fault.right} -> {fault.wrong}\n    {verdict} ({seconds:.0f} s)", flush=True)

        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(one, faults))

    planted = len(faults) - results["not in this version"]
    print(f"{planted - results['survived']} of {planted} faults caught: {dict(results)}")
    return 1 if results["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
