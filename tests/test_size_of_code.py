"""Functions, arguments and files stay small, and no module asks which tower or loss it has."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "clip_jax").rglob("*.py"))
OTHER_FILES = sorted(file for folder in ("benchmarks", "configs", "launch") for file in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 450, 60, 6
ASKS_FOR_A_TOWER = re.compile(r"isinstance\([^()]*(ResNet|Transformer)Preset|\"stage_sizes\" in")
ASKS_FOR_A_LOSS = re.compile(r"loss\.kind\s*(==|!=|in\b)|(==|!=)\s*\"(softmax|sigmoid)\"")


def functions(file: pathlib.Path) -> list[ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def number_of_arguments(function: ast.FunctionDef) -> int:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    found = functions(file)
    assert not [one.name for one in found if one.end_lineno - one.lineno >= MAX_FUNCTION_LINES]
    assert not [one.name for one in found if number_of_arguments(one) > MAX_ARGUMENTS and one.name != "__init__"]


@pytest.mark.parametrize("file", OTHER_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_outside_the_package_are_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize(
    ("question", "allowed"), [(ASKS_FOR_A_TOWER, "clip_jax/models/towers/"), (ASKS_FOR_A_LOSS, "clip_jax/losses/")]
)
def test_no_module_asks_which_tower_or_loss_it_has(question, allowed):
    asking = [str(file.relative_to(ROOT)) for file in FILES if question.search(file.read_text(encoding="utf-8"))]
    assert [name for name in asking if not name.startswith(allowed)] == []
