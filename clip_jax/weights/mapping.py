"""Converts between our parameters and the tensors of other programs, in both directions, with tables of names.

A row of a table has one of our leaves, the name or names that it has elsewhere, and how the layout differs. Braces in a
name hold a number that the tower counts (``Tower.numbers``). We stack ``{layer}`` of a transformer and ``{block}`` of a
ResNet's stage along a leading axis. ``{stage}`` repeats a row for each stage.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.models.clip import CLIP, example_inputs, loss_parameters_of
from clip_jax.models.presets import (
    CLIPPreset,
)
from clip_jax.models.towers import IMAGE_TOWERS, TEXT_TOWERS
from clip_jax.models.towers.base import ShapeError, Tower

SHOWN_NAMES = 6

Tensors = Mapping[str, np.ndarray]


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message is one line: which file, what is wrong, the fix."""


class Layout(NamedTuple):
    """Converts the axes of one tensor from theirs to ours and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _unfold_patches(kernel: np.ndarray) -> np.ndarray:
    size = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] and [in, out]
CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW and HWIO
PATCHES = Layout(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _unfold_patches)  # and [P * P * 3, W]
SCALAR = Layout(lambda x: x.reshape(()) if x.size == 1 else x, lambda x: x.reshape(()))
COUNT = Layout(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))


class Row(NamedTuple):
    """``ours`` is the dotted path of a leaf. If ``theirs`` are several, they are joined along their first axis."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def row(ours: str, theirs: str, layout: Layout = SAME) -> tuple[Row]:
    """The row of a single parameter, as a tuple."""
    return (Row(f"params.{ours}", (theirs,), layout),)


def linear(ours: str, *theirs: str) -> tuple[Row, ...]:
    """A linear layer with bias, or several that are concatenated in ours."""
    weights, biases = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return Row(f"params.{ours}.kernel", weights, TRANSPOSED), Row(f"params.{ours}.bias", biases)


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return row(f"{ours}.scale", f"{theirs}.weight") + row(f"{ours}.bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *norm(ours, theirs),
        Row(f"batch_stats.{ours}.mean", (f"{theirs}.running_mean",)),
        Row(f"batch_stats.{ours}.variance", (f"{theirs}.running_var",)),
        Row(f"batch_stats.{ours}.num_batches", (f"{theirs}.num_batches_tracked",), COUNT),
    )


class Table(NamedTuple):
    """The rows of each tower that the format supports, by the tower's name.

    ``optional`` are parameters of losses that few models have and few formats support. ``ignored`` matches the names of
    tensors that are not parameters.
    """

    format: str
    towers: Mapping[str, tuple[Row, ...]]
    logit_scale: tuple[Row, ...]
    ignored: re.Pattern = re.compile(r"(?!)")
    optional: tuple[Row, ...] = ()

    def has(self, preset: CLIPPreset) -> bool:
        """Whether the format supports both towers of this model."""
        return {preset.vision.name, preset.text.name} <= self.towers.keys()


class _Leaf(NamedTuple):
    """A leaf for one preset: ``names`` has an entry for each stacked layer, or one entry if nothing is stacked."""

    path: tuple[str, ...]
    names: list[tuple[str, ...]]
    stacked: bool
    layout: Layout


def _leaves(table: Table, preset: CLIPPreset, optional: tuple[Row, ...]) -> Iterator[_Leaf]:
    """The leaves of the preset's towers, of ``logit_scale``, and of the ``optional`` rows that the model has."""
    for rows, groups in (
        *((table.towers[tower.name], tower.numbers()) for tower in (preset.vision, preset.text)),
        (table.logit_scale, ({},)),
        (optional, ({},)),
    ):
        for ours, theirs, layout in rows:
            for numbers in groups if "{" in ours else groups[:1]:
                counted = [name for name, value in numbers.items() if _is_counted(name, value, theirs)]
                indices = numbers[counted[0]] if counted else [None]
                names = [
                    tuple(name.format(**numbers | dict.fromkeys(counted, index)) for name in theirs)
                    for index in indices
                ]
                if names:
                    yield _Leaf(tuple(ours.format(**numbers).split(".")), names, bool(counted), layout)


def _is_counted(name: str, value: int | range, theirs: Sequence[str]) -> bool:
    return isinstance(value, range) and any(f"{{{name}}}" in their for their in theirs)


@functools.cache
def _shapes(preset: CLIPPreset) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every leaf of this preset's variables."""
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(CLIP(preset).init, key, *example_inputs(preset))
    flat = jax.tree_util.tree_leaves_with_path(variables)
    keys = [tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey)) for path, _ in flat]
    return {key: leaf.shape for key, (_, leaf) in zip(keys, flat, strict=True)}


def list_names(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def to_variables(tensors: Tensors, table: Table, preset: CLIPPreset) -> dict:
    """Their tensors as our ``params`` and ``batch_stats``, in the same dtypes.

    Raises:
      WeightsError: tensors are missing, left over or of another shape than the preset's; one message lists all kinds.
    """
    variables, problems, seen = {"params": {}, "batch_stats": {}}, [], set()
    optional = tuple(row for row in table.optional if any(name in tensors for name in row.theirs))
    leaves = list(_leaves(table, preset, optional))
    shapes = _shapes(preset) | {tuple(row.ours.split(".")): () for row in optional}
    missing = [name for leaf in leaves for names in leaf.names for name in names if name not in tensors]
    # PyTorch before 0.4.1 had no such counter, and nothing is computed from it.
    absent_counters = {name for name in missing if name.endswith(".num_batches_tracked")}
    missing = [name for name in missing if name not in absent_counters]
    wrong = []
    for leaf in leaves:
        seen.update(name for names in leaf.names for name in names)
        if any(name in missing for names in leaf.names for name in names):
            continue
        arrays = []
        for names in leaf.names:
            parts = [np.zeros((), np.int64) if name in absent_counters else tensors[name] for name in names]
            try:
                array = leaf.layout.to_ours(np.concatenate(parts) if len(parts) > 1 else parts[0])
            except ValueError:  # another number of axes
                array = None
            arrays.append(array)
        expected = shapes[leaf.path]
        layer_shape = expected[1:] if leaf.stacked else expected
        differing = [
            name
            for names, array in zip(leaf.names, arrays, strict=True)
            if array is None or array.shape != layer_shape
            for name in names
        ]
        if differing:
            wrong += [f"{name} {'x'.join(map(str, tensors[name].shape)) or '()'}" for name in differing]
            continue
        node = variables
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = np.stack(arrays) if leaf.stacked else arrays[0]
    unexpected = [name for name in tensors if name not in seen and not table.ignored.search(name)]
    for what, names in (
        ("missing", missing),
        ("not part of this model", unexpected),
        ("of another shape", wrong),
    ):
        if names:
            problems.append(f"{what}: {list_names(names)}")
    if problems:
        raise WeightsError(f"the tensors are not those of the model that they seem to be; {'; '.join(problems)}")
    return variables


def to_tensors(variables: dict, table: Table, preset: CLIPPreset) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_variables`: contiguous tensors by their names, in the same dtypes.

    Raises:
      WeightsError: the format does not have the parameters of the model's loss.
    """
    tensors = {}
    paths = {f"params.{name}": name for name, _ in loss_parameters_of(variables["params"])}
    known = {row.ours for row in (*table.logit_scale, *table.optional)}
    if without_place := [name for path, name in paths.items() if path not in known]:
        raise WeightsError(
            f"{table.format} has no place for the loss's {', '.join(without_place)}; clip_jax has one for everything "
            "that a loss learns, and open_clip for logit_bias"
        )
    for leaf in _leaves(table, preset, tuple(row for row in table.optional if row.ours in paths)):
        node = variables
        for key in leaf.path:
            node = node[key]
        array = np.asarray(node)
        for names, layer in zip(leaf.names, array if leaf.stacked else [array], strict=True):
            theirs = leaf.layout.to_theirs(layer)
            parts = np.split(theirs, len(names)) if len(names) > 1 else [theirs]
            tensors.update({name: np.asarray(part, order="C") for name, part in zip(names, parts, strict=True)})
    return tensors


class _TensorShapes:
    """The shapes of one tower's parameters in a file; implements :class:`clip_jax.models.towers.base.Shapes`."""

    def __init__(self, tensors: Tensors, table: Table, tower: type[Tower]):
        self._tensors, self._table = tensors, table
        prefix = f"params.{tower.section}."
        self._rows = {row.ours.removeprefix(prefix): row for row in table.towers[tower.name]}

    def share_found(self) -> float:
        """The share of the tower's parameters that the file has, looking at first layers only."""
        return sum(self._first(path) in self._tensors for path in self._rows) / len(self._rows)

    def _first(self, path: str) -> str:
        return self._rows[path].theirs[0].format(layer=0, stage=1, block=0)

    def shape(self, path: str) -> tuple[int, ...]:
        name = self._first(path)
        if name not in self._tensors:
            raise WeightsError(
                f"these are not the weights of a CLIP as {self._table.format} has them: no {name} in them"
            )
        return self._rows[path].layout.to_ours(self._tensors[name]).shape

    def count(self, path: str, number: str, **others: int) -> int:
        pattern = re.escape(self._rows[path].theirs[0].format(**others, **{number: "{number}"}))
        found = (re.fullmatch(pattern.replace(r"\{number\}", r"(\d+)"), name) for name in self._tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)


def preset_from_shapes(tensors: Tensors, table: Table, activation: str) -> CLIPPreset:
    """The preset that has these shapes. The shapes do not determine the activation or the width of heads.

    Raises:
      WeightsError: the tensors are not those of a CLIP.
    """

    def likeliest(towers: Mapping[str, type[Tower]]) -> tuple[type[Tower], _TensorShapes]:
        known = [(towers[name], _TensorShapes(tensors, table, towers[name])) for name in table.towers if name in towers]
        return max(known, key=lambda one: one[1].share_found())

    try:
        (text, text_shapes), (vision, vision_shapes) = likeliest(TEXT_TOWERS), likeliest(IMAGE_TOWERS)
        text_preset = text.from_shapes(text_shapes, activation)
        *_, embed_dim = text_shapes.shape(text.projection)
        return CLIPPreset(embed_dim, vision.from_shapes(vision_shapes, activation), text_preset)
    except ShapeError as error:
        raise WeightsError(str(error)) from None
