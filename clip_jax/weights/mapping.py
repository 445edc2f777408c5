"""How other programs name and lay out CLIP's tensors, as tables that serve both directions.

A table is a tuple of rows: one of our leaves, the name or names that it has elsewhere, and how the layout differs.
Braces in a name count what we keep stacked along a leading axis: ``{layer}`` of a transformer and ``{block}`` of a
ResNet's stage; ``{stage}`` repeats a row for each stage.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.models.clip import CLIP, example_inputs, loss_parameters_of
from clip_jax.models.presets import (
    RESNET_REDUCTION,
    CLIPPreset,
    ResNetPreset,
    TextTransformerPreset,
    VisionTransformerPreset,
)

HEAD_WIDTH = 64
# Widths at which open_clip's models have other heads than 64 wide: ViT-H, ViT-g, ViT-bigG and ViT-e, each with 16.
VISION_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}
SHOWN_NAMES = 6

Tensors = Mapping[str, np.ndarray]


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message is one line: which file, what is wrong, the mend."""


class Layout(NamedTuple):
    """The axes of one tensor, from theirs to ours and back."""

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
    """``ours`` is the dotted path of a leaf; several of ``theirs`` are joined along their first axis."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def row(ours: str, theirs: str, layout: Layout = SAME) -> tuple[Row]:
    """A parameter that has a row of its own."""
    return (Row(f"params.{ours}", (theirs,), layout),)


def linear(ours: str, *theirs: str) -> tuple[Row, ...]:
    """A linear layer with bias, or several side by side in ours."""
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
    """The rows of each kind of tower; ``resnet`` is empty in a format that knows none.

    ``optional`` are parameters of losses that few models have and few formats know.
    """

    format: str
    vision_transformer: tuple[Row, ...]
    text: tuple[Row, ...]
    resnet: tuple[Row, ...] = ()
    ignored: re.Pattern = re.compile(r"(?!)")
    optional: tuple[Row, ...] = ()


class _Leaf(NamedTuple):
    """A leaf for one preset: ``names`` has an entry for each layer, or one where nothing is stacked."""

    path: tuple[str, ...]
    names: list[tuple[str, ...]]
    stacked: bool
    layout: Layout


def _leaves(table: Table, preset: CLIPPreset, optional: tuple[Row, ...]) -> Iterator[_Leaf]:
    """The leaves of the preset's towers, and of those ``optional`` rows of the table that a model has."""
    vision, text = preset.vision, preset.text
    resnet = isinstance(vision, ResNetPreset)
    if resnet and not table.resnet:
        raise WeightsError(f"{table.format} has no ResNets; write this model for open_clip")
    for rows, layers in (
        (table.resnet, None) if resnet else (table.vision_transformer, vision.num_layers),
        (table.text, text.num_layers),
        (optional, None),
    ):
        for ours, theirs, layout in rows:
            for stage, size in enumerate(vision.stage_sizes, 1) if "{stage}" in ours else [(None, None)]:
                # A stage's first block stands alone, since it alone has strides and a convolution as its shortcut.
                blocks = range(1, size) if any("{block}" in name for name in theirs) else None
                counted = blocks if blocks is not None else range(layers) if "{layer}" in theirs[0] else None
                if counted is not None and not len(counted):
                    continue
                names = [
                    tuple(name.format(stage=stage, layer=index, block=index) for name in theirs)
                    for index in (counted if counted is not None else [None])
                ]
                yield _Leaf(tuple(ours.format(stage=stage).split(".")), names, counted is not None, layout)


@functools.cache
def _shapes(preset: CLIPPreset) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every leaf of this preset's variables."""
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(CLIP(preset).init, key, *example_inputs(preset))
    flat = jax.tree_util.tree_leaves_with_path(variables)
    keys = [tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey)) for path, _ in flat]
    return {key: leaf.shape for key, (_, leaf) in zip(keys, flat, strict=True)}


def list_names(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def to_variables(tensors: Tensors, table: Table, preset: CLIPPreset) -> dict:
    """Their tensors as our ``params`` and ``batch_stats``, in the dtypes that they came in.

    Raises:
      WeightsError: tensors are missing, left over or of another shape than the preset's; all are named together.
    """
    variables, problems, seen = {"params": {}, "batch_stats": {}}, [], set()
    optional = tuple(row for row in table.optional if any(name in tensors for name in row.theirs))
    leaves = list(_leaves(table, preset, optional))
    shapes = _shapes(preset) | {tuple(row.ours.split(".")): () for row in optional}
    missing = [name for leaf in leaves for names in leaf.names for name in names if name not in tensors]
    # PyTorch older than 0.4.1 had no such counter, and nothing is computed from it.
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
    """The inverse of :func:`to_variables`: contiguous tensors by their names, in the dtypes of ours.

    Raises:
      WeightsError: the format has no such model.
    """
    tensors = {}
    paths = {f"params.{name}": name for name, _ in loss_parameters_of(variables["params"])}
    known = {row.ours for row in (*table.text, *table.optional)}
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


def preset_from_shapes(tensors: Tensors, table: Table, activation: str) -> CLIPPreset:
    """The preset that has these shapes; what no shape tells is how wide heads are, and the activation.

    Raises:
      WeightsError: these are not the tensors of a CLIP.
    """

    def ours(name: str, rows: tuple[Row, ...]) -> np.ndarray:
        found = next(row for row in rows if row.ours == f"params.{name}")
        theirs = found.theirs[0].format(layer=0, stage=1)
        if theirs not in tensors:
            raise WeightsError(f"these are not the weights of a CLIP as {table.format} has them: no {theirs} in them")
        return found.layout.to_ours(tensors[theirs])

    def count(pattern: str) -> int:
        found = (re.fullmatch(re.escape(pattern).replace(r"\{number\}", r"(\d+)"), name) for name in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def transformer(tower: str, rows: tuple[Row, ...]) -> dict:
        norm_1 = next(row for row in rows if row.ours == f"params.{tower}.transformer.blocks.ln_1.scale")
        width, mlp_width = ours(f"{tower}.transformer.blocks.fc1.kernel", rows).shape
        num_heads = VISION_HEADS.get(width) if tower == "vision" else None
        if num_heads is None and width % HEAD_WIDTH:
            raise WeightsError(
                f"how many heads the {tower} tower has cannot be seen from its width of {width}; "
                f"put the model's config beside the file"
            )
        return {
            "width": width,
            "num_layers": count(norm_1.theirs[0].replace("{layer}", "{number}")),
            "num_heads": num_heads or width // HEAD_WIDTH,
            "activation": activation,
            "mlp_ratio": mlp_width / width,
        }

    def side(num_positions: int) -> int:
        if num_positions < 2:
            raise WeightsError("the image tower has no positions")
        length = math.isqrt(num_positions - 1)
        if length**2 != num_positions - 1:
            raise WeightsError(f"{num_positions - 1} positions of the image tower do not make a square")
        return length

    rows = table.text
    vocab_size, _ = ours("text.token_embedding", rows).shape
    context_length, _ = ours("text.positional_embedding", rows).shape
    _, embed_dim = ours("text.projection.kernel", rows).shape
    text = TextTransformerPreset(context_length=context_length, vocab_size=vocab_size, **transformer("text", rows))
    resnet = next((row for row in table.resnet if row.ours.endswith("attention_pool.positional_embedding")), None)
    if resnet is not None and resnet.theirs[0] in tensors:
        rows = table.resnet
        num_positions, channels = ours("vision.attention_pool.positional_embedding", rows).shape
        last_block = next(row for row in rows if row.ours.endswith("stage{stage}_rest.bn1.scale")).theirs[0]
        vision = ResNetPreset(
            image_size=RESNET_REDUCTION * side(num_positions),
            width=channels // RESNET_REDUCTION,
            stage_sizes=tuple(count(last_block.format(stage=stage, block="{number}")) for stage in (1, 2, 3, 4)),
            num_heads=channels // HEAD_WIDTH,
        )
    else:
        rows = table.vision_transformer
        patch_size = math.isqrt(ours("vision.patch_embedding.kernel", rows).shape[0] // 3)
        num_positions, _ = ours("vision.positional_embedding", rows).shape
        vision = VisionTransformerPreset(side(num_positions) * patch_size, patch_size, **transformer("vision", rows))
    return CLIPPreset(embed_dim, vision, text)
