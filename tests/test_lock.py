"""The versions that documents and docstrings state are those of the lock, ``constraints.txt``."""

import importlib.metadata
import pathlib
import re

import pytest
from packaging.requirements import Requirement

REPOSITORY = pathlib.Path(__file__).parent.parent
LOCK = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines())
STATED = re.compile(r"\blibtpu(?:'s)?\W{1,9}v?(\d+(?:\.\d+)+)", re.IGNORECASE)  # libtpu 0.1, libtpu's 0.1, libtpu==0.1
WITH_JAX = re.compile(r"\bjax (\d+(?:\.\d+)+), libtpu\b")


def stated_elsewhere(text: str, lock: dict[str, str] = LOCK) -> list[str]:
    """What a text states of libtpu, and of the jax beside it, that the lock does not."""
    return [
        stated[0]
        for pattern, package in ((STATED, "libtpu"), (WITH_JAX, "jax"))
        for stated in pattern.finditer(text)
        if stated[1] != lock[package]
    ]


def texts() -> dict[str, str]:
    """Documents, of the changelog what is not released yet, and all of the program."""
    patterns = (
        "*.md",
        "docs/*.md",
        "benchmarks/*.md",
        "launch/*",
        "clip_jax/**/*.py",
        "benchmarks/*.py",
        "configs/*.py",
    )
    files = [file for pattern in patterns for file in sorted(REPOSITORY.glob(pattern)) if file.is_file()]
    found = {str(file.relative_to(REPOSITORY)): file.read_text(encoding="utf-8") for file in files}
    found["CHANGELOG.md"] = "\n## ".join(found["CHANGELOG.md"].split("\n## ")[:2])
    return found


def test_every_version_of_libtpu_that_is_stated_is_the_locks():
    assert {name: wrong for name, text in texts().items() if (wrong := stated_elsewhere(text))} == {}


@pytest.mark.parametrize("document", ["docs/tpu.md", "docs/pods.md"])
def test_a_document_with_the_compilers_figures_states_its_version_once(document):
    assert STATED.findall((REPOSITORY / document).read_text(encoding="utf-8")) == [LOCK["libtpu"]]


@pytest.mark.parametrize(
    "text",
    [
        "libtpu 0.0.52",
        "libtpu\n0.0.52",
        "(libtpu 0.0.42)",
        "`libtpu==0.0.42.2`",
        "libtpu's 0.0.52",
        "jax 0.10.3, libtpu 1.2",
    ],
)
def test_another_version_is_found(text):
    assert stated_elsewhere(text, {"libtpu": "1.2" if "jax" in text else "0.0.42.1", "jax": "0.10.2"})


def test_the_locks_libtpu_is_one_that_its_jax_installs():
    if importlib.metadata.version("jax") != LOCK["jax"]:
        pytest.skip("another jax than the lock's is installed")
    wanted = [Requirement(one) for one in importlib.metadata.requires("jax")]
    (libtpu,) = [one for one in wanted if one.name == "libtpu" and one.marker.evaluate({"extra": "tpu"})]
    assert LOCK["libtpu"] in libtpu.specifier
