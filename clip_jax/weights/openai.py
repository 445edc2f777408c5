"""OpenAI's tensor names and layouts, which open_clip also uses, and the ``.pt`` files that ``clip.load`` reads.

Source: ``clip/model.py`` of github.com/openai/CLIP.
"""

import dataclasses
import pathlib
import re

from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.transformer_tower import HEAD_WIDTH
from clip_jax.weights.mapping import (
    CONVOLUTION,
    PATCHES,
    SCALAR,
    TRANSPOSED,
    Row,
    Table,
    WeightsError,
    batch_norm,
    linear,
    norm,
    row,
    to_tensors,
)
from clip_jax.weights.torch_file import write_torch_file


def _blocks(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *norm(f"{ours}.ln_1", f"{theirs}.ln_1"),
        *row(f"{ours}.qkv.kernel", f"{theirs}.attn.in_proj_weight", TRANSPOSED),
        *row(f"{ours}.qkv.bias", f"{theirs}.attn.in_proj_bias"),
        *linear(f"{ours}.attention_output", f"{theirs}.attn.out_proj"),
        *norm(f"{ours}.ln_2", f"{theirs}.ln_2"),
        *linear(f"{ours}.fc1", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}.fc2", f"{theirs}.mlp.c_proj"),
    )


def _bottleneck(ours: str, theirs: str) -> tuple[Row, ...]:
    return tuple(
        row_
        for number in (1, 2, 3)
        for row_ in (
            *row(f"{ours}.conv{number}.kernel", f"{theirs}.conv{number}.weight", CONVOLUTION),
            *batch_norm(f"{ours}.bn{number}", f"{theirs}.bn{number}"),
        )
    )


TABLE = Table(
    format="OpenAI",
    towers={
        "vision_transformer": (
            *row("vision.class_embedding", "visual.class_embedding"),
            *row("vision.positional_embedding", "visual.positional_embedding"),
            *row("vision.projection.kernel", "visual.proj"),
            *row("vision.patch_embedding.kernel", "visual.conv1.weight", PATCHES),
            *norm("vision.ln_pre", "visual.ln_pre"),
            *_blocks("vision.transformer.blocks", "visual.transformer.resblocks.{layer}"),
            *norm("vision.ln_post", "visual.ln_post"),
        ),
        "resnet": (
            *_bottleneck("vision", "visual"),  # the stem has the names of a block
            *_bottleneck("vision.stage{stage}_first", "visual.layer{stage}.0"),
            *row(
                "vision.stage{stage}_first.downsample_conv.kernel",
                "visual.layer{stage}.0.downsample.0.weight",
                CONVOLUTION,
            ),
            *batch_norm("vision.stage{stage}_first.downsample_bn", "visual.layer{stage}.0.downsample.1"),
            *_bottleneck("vision.stage{stage}_rest", "visual.layer{stage}.{block}"),
            *row("vision.attention_pool.positional_embedding", "visual.attnpool.positional_embedding"),
            *linear("vision.attention_pool.key", "visual.attnpool.k_proj"),
            *linear("vision.attention_pool.query", "visual.attnpool.q_proj"),
            *linear("vision.attention_pool.value", "visual.attnpool.v_proj"),
            *linear("vision.attention_pool.output", "visual.attnpool.c_proj"),
        ),
        "text_transformer": (
            *row("text.positional_embedding", "positional_embedding"),
            *row("text.projection.kernel", "text_projection"),
            *_blocks("text.transformer.blocks", "transformer.resblocks.{layer}"),
            *row("text.token_embedding", "token_embedding.weight"),
            *norm("text.ln_final", "ln_final"),
        ),
    },
    logit_scale=row("logit_scale", "logit_scale", SCALAR),
    # Three sizes in OpenAI's archives, and a mask that follows from the context length.
    ignored=re.compile(r"^(input_resolution|context_length|vocab_size)$|(^|\.)attn_mask$"),
)


def write(path: pathlib.Path, variables: dict, preset: CLIPPreset) -> None:
    """Writes a ``.pt`` that ``clip.load`` reads.

    Raises:
      WeightsError: ``clip`` has no such model: it has only QuickGELU, heads 64 wide, MLPs four times as wide as the
        tower, and its own preprocessing.
    """
    default = dataclasses.asdict(Preprocessing())
    other = [
        f"{name}={value}" for name, value in dataclasses.asdict(preset.preprocessing).items() if value != default[name]
    ]
    if other:
        raise WeightsError(
            f"OpenAI's program has no option for the preprocessing {', '.join(other)}; write --to=clip_jax"
        )
    for name, tower in (("vision", preset.vision), ("text", preset.text)):
        for key, wanted in (("activation", "quick_gelu"), ("mlp_ratio", 4.0)):
            value = getattr(tower, key, wanted) or wanted  # a ResNet has neither
            if value != wanted:
                raise WeightsError(f"OpenAI's program has no {name} tower with {key}={value}; write --to=open_clip")
        if tower.head_width != HEAD_WIDTH:
            raise WeightsError(f"OpenAI's program has no {name} tower whose heads are not 64 wide; write --to=clip_jax")
    write_torch_file(path, to_tensors(variables, TABLE, preset))
