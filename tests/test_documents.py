"""Every fenced block of the documents is executed unchanged, or listed with the reason why it is not."""

import ast
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from documented_blocks import BLOCKS, Run, Skip
from fenced_blocks import Block, fenced_blocks
from fresh_clone import REPOSITORY, Clone

EXECUTED = ("sh", "python")
LISTED = (*EXECUTED, "dockerfile")
COMMAND = re.compile(r"\s*(\$ |!|python |pip |make |\.venv/)")


def documents() -> list[pathlib.Path]:
    folders = (".", "docs", "benchmarks", "launch", "clip_jax/data/emoji")
    return [file for folder in folders for file in sorted((REPOSITORY / folder).glob("*.md"))]


ALL = [
    block
    for file in documents()
    for block in fenced_blocks(str(file.relative_to(REPOSITORY)), file.read_text(encoding="utf-8"))
]


def entries_of(block: Block, blocks=BLOCKS) -> list[Run | Skip]:
    return [entry for entry in blocks if entry.document == block.document and block.text.startswith(entry.start)]


def unlisted(blocks: list[Block], entries=BLOCKS) -> list[str]:
    """What is wrong with the blocks or with the table, a line each."""
    problems = []
    for block in blocks:
        where = f"{block.document}:{block.line}"
        if block.language in LISTED:
            found = len(entries_of(block, entries))
            if found != 1:
                problems.append(f"{where} has {found} entries in tests/helpers/documented_blocks.py instead of one")
        elif block.language not in ("", "json"):
            problems.append(f"{where}: {block.language!r} is none of {', '.join(LISTED)}, json or nothing for output")
        elif not block.language and any(map(COMMAND.match, block.text.splitlines())):
            problems.append(f"{where} has a command but is not marked as sh")
    for entry in entries:
        if sum(entry in entries_of(block, entries) for block in blocks) != 1:
            problems.append(f"the entry {entry.document}, {entry.start!r} does not name one block")
        if isinstance(entry, Skip) and not entry.reason:
            problems.append(f"{entry.document}, {entry.start!r} is skipped without a reason")
    return problems


def test_every_block_has_one_entry_and_every_entry_a_block():
    assert unlisted(ALL) == []
    assert {block.document for block in ALL} >= {"README.md", "docs/data.md", "docs/weights.md"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```sh\npython -m clip_jax.new\n```", "has 0 entries"),
        ("1. so:\n\n   ~~~python\n   import clip_jax.new\n   ~~~", "has 0 entries"),
        ("```console\n$ ls\n```", "'console' is none of"),
        ("```\nmake test\n```", "not marked as sh"),
        ("", "does not name one block"),
        ("```sh\nmake a\n```\n```sh\nmake a\n```", "does not name one block"),
    ],
)
def test_what_the_table_does_not_cover_is_found(text, problem):
    entries = (Run("new.md", "make a"),)
    assert any(problem in line for line in unlisted(fenced_blocks("new.md", text), entries))


def test_a_fence_that_is_not_closed_is_refused():
    with pytest.raises(ValueError, match=r"new\.md:2"):
        fenced_blocks("new.md", "text\n```sh\nmake a\n")


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "json"], ids=lambda b: b.document)
def test_json_can_be_read(block):
    json.loads(block.text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("documents"))


def prepare(clone: Clone, entry: Run) -> None:
    for name in entry.removes:
        path = clone.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name, text in entry.files.items():
        (clone.folder / name).write_text(text)


EXECUTABLE = [
    (block, entry)
    for block in ALL
    if block.language in EXECUTED
    for entry in entries_of(block)
    if isinstance(entry, Run)
]


@pytest.mark.parametrize(("block", "entry"), EXECUTABLE, ids=[f"{b.document}:{e.start[:40]}" for b, e in EXECUTABLE])
def test_the_block_runs(block, entry, clone, monkeypatch):
    prepare(clone, entry)
    if block.language == "sh":
        done = clone.run(block.text)
        assert done.returncode == 0, f"{block.document}:{block.line}\n{done.stdout}"
        assert "Traceback" not in done.stdout
    else:
        monkeypatch.chdir(clone.folder)
        run_python(block.text)
    assert [name for name in entry.writes if not (clone.folder / name).exists()] == []


def run_python(text: str) -> None:
    """Executes the statements one by one; a comment such as ``# int32 [1, D]`` must describe the expression's value."""
    names: dict = {}
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "document", "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), "document", "eval"), names)
        check_comment(lines[statement.end_lineno - 1].partition("  # ")[2], value)


def check_comment(comment: str, value) -> None:
    """Compares type and shape where the comment states them; a letter is a dimension of any size."""
    shape = re.search(r"\[([\w, ]+)\]", comment)
    if not shape:
        return
    stated = shape[1].split(", ")
    assert len(stated) == np.ndim(value), comment
    assert all(not size.isdigit() or int(size) == actual for size, actual in zip(stated, value.shape, strict=True))
    dtype = re.match(r"u?int\d+|float\d+", comment)
    assert not dtype or value.dtype == dtype[0], comment
    if "unit vectors" in comment:
        np.testing.assert_allclose(np.linalg.norm(value, axis=1), 1, rtol=1e-5)
    if "probabilities" in comment:
        np.testing.assert_allclose(value.sum(axis=1), 1, rtol=1e-5)


def test_a_comment_that_states_another_shape_or_type_is_found():
    check_comment("int32 [1, L]", np.zeros((1, 3), np.int32))
    for wrong in ("int32 [2, L]", "int32 [3]", "float32 [1, 3]", "probabilities, [1, 3]"):
        with pytest.raises(AssertionError):
            check_comment(wrong, np.zeros((1, 3), np.int32))
