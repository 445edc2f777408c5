"""Compiles a step in another process, with a progress line, and caches the result on disk."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import ml_collections

from clip_jax.cache import cache_folder
from clip_jax.files import write_atomically
from clip_jax.planning.topologies import Topology

PACKAGE = pathlib.Path(__file__).parent.parent
# The sources that affect the compiled program or what is read from it. The text of reports does not.
SOURCES = (
    "models",
    "losses",
    "sharding.py",
    *(f"training/{name}.py" for name in ("step", "state", "accumulation", "optimizer")),
    *(f"planning/{name}.py" for name in ("hlo", "program", "compiled", "topologies")),
)
# Keys of the config that no compiled step depends on.
NOT_COMPILED = ("data", "evaluation", "seed", "init_from", "epochs", "steps", "progressive_resolution")


class PlanError(ValueError):
    """A mistake of the user, or a compilation that failed; the message is one line."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _without_words(source: str) -> str:
    """A source without its comments, layout and docstrings, which do not affect what is compiled."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def cache_key(config: ml_collections.ConfigDict, topology: Topology) -> str:
    """A digest of everything that a compiled step depends on."""
    sources = hashlib.sha256()
    for name in SOURCES:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sources.update(_without_words(file.read_text(encoding="utf-8")).encode())
    compiled = {
        name: value
        for name, value in config.to_dict().items()
        if name not in NOT_COMPILED and not name.startswith(("log_", "eval_", "checkpoint"))
    }
    parts = {
        "config": compiled,
        "topology": topology.name,
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "libtpu")},
        "flags": [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        "sources": sources.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def known_facts(config: ml_collections.ConfigDict, topology: Topology) -> dict | None:
    """The cached result of an earlier compilation of the same step, or None."""
    try:
        return json.loads((cache_folder("plan") / f"{cache_key(config, topology)}.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def compile_facts(config: ml_collections.ConfigDict, topology: Topology, what: str = "") -> dict:
    """The cached or new result of :func:`clip_jax.planning.compiled.compile_step`.

    ``what`` names the step in the progress line.

    Raises:
      PlanError: libtpu is missing or rejects a flag, or the slice, the mesh and the batch are not compatible.
    """
    facts = known_facts(config, topology)
    if facts is not None:
        return facts
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError('the compiler for TPUs is not installed: pip install "clip-jax-tpu[tpu]"')
    facts = _ask_child(config, topology, what or topology.name)
    path = cache_folder("plan") / f"{cache_key(config, topology)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(facts))
    except OSError as error:
        print(f"not kept for the next time: {error}", file=sys.stderr)
    return facts


def _ask_child(config: ml_collections.ConfigDict, topology: Topology, what: str) -> dict:
    request = json.dumps({"config": config.to_dict(), "topology": topology.name})
    search_path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    # Files, not pipes: a pipe that is not read would block the child.
    with (
        tempfile.TemporaryFile("w+") as question,
        tempfile.TemporaryFile("w+") as answer,
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        question.write(request)
        question.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "clip_jax.planning.compiled"],
            stdin=question,
            stdout=answer,
            stderr=log,
            env=os.environ | {"PYTHONPATH": search_path},
        )
        try:
            _show_progress(child, what)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        answer.seek(0)
        log.seek(0)
        if child.returncode != 0:
            raise PlanError(why_it_ended(log.read(), child.returncode))
        result = json.loads(answer.read())
    if "error" in result:
        raise PlanError(result["error"])
    return result["facts"]


def _show_progress(child: subprocess.Popen, what: str) -> None:
    """Counts seconds in one line on a terminal, or prints a line every 30 seconds elsewhere, until the child ends."""
    terminal, started, reported = sys.stderr.isatty(), time.monotonic(), 0.0
    while True:
        try:
            child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            elapsed = time.monotonic() - started
            if terminal:
                print(f"\rcompiling {what}: {elapsed:.0f} s ", end="", file=sys.stderr, flush=True)
            elif elapsed - reported >= 30:
                reported = elapsed
                print(f"compiling {what}: {elapsed:.0f} s", file=sys.stderr, flush=True)
            continue
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return


def why_it_ended(log: str, code: int) -> str:
    """One line that states why a compiling process ended without an answer, from its log and its exit code."""
    flag = re.search(r"ERROR: (Unknown command line flag '.*?'|Illegal value .*? specified for flag '.*?')", log)
    if flag:
        return f"the compiler rejects what LIBTPU_INIT_ARGS holds: {flag[1]}"
    flag = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", log)
    if flag:
        return f"the compiler rejects what XLA_FLAGS holds: {flag[1].strip()}"
    # Otherwise the line of the last exception, or the last line before an abort.
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(("*", "@", " "))]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    reason = (exceptions or lines or ["it said nothing"])[-1][:300]
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"the compiling process {how}: {reason}"
