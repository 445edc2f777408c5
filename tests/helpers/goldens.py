"""The models in tests/weights/golden, which PyTorch's CLIPs have saved, unpacked for the tests that read them."""

import io
import lzma
import pathlib
import tarfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import Weights
from clip_jax.weights.tensor_files import read_tensors

ARCHIVES = pathlib.Path(__file__).parent.parent / "weights" / "golden"
OPENAI_VIT = CLIPPreset(
    32,
    VisionTransformerPreset(image_size=24, patch_size=8, width=128, num_layers=1, num_heads=2),
    TextTransformerPreset(width=64, num_layers=2, num_heads=1, context_length=8, vocab_size=64),
)
OPENAI_RESNET = CLIPPreset(
    32,
    ResNetPreset(image_size=64, width=4, stage_sizes=(1, 2, 1, 2), num_heads=2),
    TextTransformerPreset(width=64, num_layers=1, num_heads=1, context_length=8, vocab_size=64),
)
OPEN_CLIP_VIT = CLIPPreset(
    32,
    VisionTransformerPreset(32, 16, 48, 2, 3, "gelu", mlp_ratio=209 / 48),  # 4.3637 cut off to whole units
    TextTransformerPreset(32, 2, 4, 8, 64, "gelu"),
)
OPEN_CLIP_RESNET = CLIPPreset(32, ResNetPreset(64, 4, (2, 1, 2, 1), 2), TextTransformerPreset(32, 2, 4, 8, 64))


def _huggingface(activation: str) -> CLIPPreset:
    return CLIPPreset(
        32,
        VisionTransformerPreset(24, 8, 48, 2, 3, activation, mlp_ratio=2),
        TextTransformerPreset(32, 2, 2, 8, 64, activation, mlp_ratio=3),
    )


class Golden(NamedTuple):
    """``path`` is what a person would name, ``file`` the one with the tensors; ``expected`` is the peer's answer."""

    path: pathlib.Path
    file: pathlib.Path
    expected: dict[str, np.ndarray]

    def tensors(self) -> dict[str, np.ndarray]:
        """What the file holds, by the peer's names."""
        return load_file(self.file) if self.file.suffix == ".safetensors" else read_tensors(self.file)[0]


class Model(NamedTuple):
    """What a golden model is: where its tensors lie, the format that is recognised, and its preset."""

    file: str
    format: str
    preset: CLIPPreset


MODELS = {
    "openai_vit/archive": Model("archive.pt", "OpenAI", OPENAI_VIT),
    "openai_vit/float16": Model("float16.pt", "OpenAI", OPENAI_VIT),
    "openai_vit/float32": Model("float32.pt", "OpenAI", OPENAI_VIT),
    "openai_resnet/archive": Model("archive.pt", "OpenAI", OPENAI_RESNET),
    "openai_resnet/float16": Model("float16.pt", "OpenAI", OPENAI_RESNET),
    "openai_resnet/float32": Model("float32.pt", "OpenAI", OPENAI_RESNET),
    "open_clip_vit/gelu": Model("gelu/open_clip_model.safetensors", "open_clip", OPEN_CLIP_VIT),
    "open_clip_resnet/checkpoint": Model("checkpoint/open_clip_pytorch_model.bin", "open_clip", OPEN_CLIP_RESNET),
    "huggingface/quick_gelu": Model("quick_gelu/model.safetensors", "Hugging Face", _huggingface("quick_gelu")),
    "huggingface/gelu": Model("gelu/model.safetensors", "Hugging Face", _huggingface("gelu")),
}


def unpack(folder: pathlib.Path) -> dict[str, Golden]:
    """Unpacks every archive into the folder; the models by the names of MODELS."""
    for archive in ARCHIVES.glob("*.tar.xz"):
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as tar:
            tar.extractall(
                folder / archive.name.removesuffix(".tar.xz"),
                **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}),
            )
    goldens = {}
    for name, model in MODELS.items():
        file = folder / name.partition("/")[0] / model.file
        path = file.parent if "/" in model.file else file
        with np.load(folder / f"{name}.npz") as expected:
            goldens[name] = Golden(path, file, dict(expected))
    return goldens


def compute(weights: Weights, images: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings and logits of uint8 images and tokens, in float32, straight from the module."""
    model = CLIP(weights.preset)

    @jax.jit
    def apply(variables):
        image_embeddings, text_embeddings, logit_scale = model.apply(
            variables, normalize_images(images, Preprocessing()), tokens
        )
        logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T
        return {"image_embeddings": image_embeddings, "text_embeddings": text_embeddings, "logits": logits}

    as_float32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), weights.variables)
    return jax.tree.map(np.asarray, apply(as_float32))


def assert_like_the_peer(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ("image_embeddings", "text_embeddings"):
        cosines = (np.float64(actual[name]) * expected[name]).sum(axis=1)
        assert (1 - cosines < 1e-5).all(), name
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-4)
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=1e-4)


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


def flat(variables: dict) -> dict[str, np.ndarray]:
    """The leaves of a tree by their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
