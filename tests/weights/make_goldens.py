"""Writes golden/*.tar.xz: small models that PyTorch's CLIPs have saved, and what each computes from them.

    pip install -e ".[peers]"
    python -m tests.weights.make_goldens

An archive holds files or folders just as the peer wrote them, and beside each NAME a ``NAME.npz``: uint8 images and
tokens, and the peer's embeddings and logits for them in float32. Weights are random, and none are left at values
where exchanging two tensors would not show. Large matrices take only a few values each, so that they compress well.
"""

import io
import json
import lzma
import pathlib
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # for `python tests/weights/make_goldens.py`

import benchmarks.peers  # noqa: F401

# isort: split
import clip.model
import numpy as np
import open_clip
import safetensors.torch
import torch
import transformers
from open_clip.push_to_hf_hub import save_config_for_hf

from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD

GOLDEN = pathlib.Path(__file__).with_name("golden")
CONTEXT, VOCABULARY, EMBED_DIM = 8, 64, 32
OPENAI_VIT = (EMBED_DIM, 24, 1, 128, 8, CONTEXT, VOCABULARY, 64, 1, 2)
OPENAI_RESNET = (EMBED_DIM, 64, (1, 2, 1, 2), 4, None, CONTEXT, VOCABULARY, 64, 1, 1)
OPEN_CLIP_TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
OPEN_CLIP_VIT = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "mlp_ratio": 4.3637, "patch_size": 16},
    "text_cfg": OPEN_CLIP_TEXT,
}
OPEN_CLIP_RESNET = {
    "embed_dim": EMBED_DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [2, 1, 2, 1], "width": 4, "patch_size": None},
    "text_cfg": OPEN_CLIP_TEXT,
}


def randomize(model: torch.nn.Module, image_size: int) -> None:
    """Moves what starts at 0 or 1 away from there, and rounds large matrices to few values."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "logit_scale":
                tensor.fill_(2.3)
            elif tensor.is_floating_point() and tensor.ndim == 1 and "running" not in name:
                tensor.add_(0.2 * torch.randn_like(tensor) + (0.5 if name.endswith("bn3.weight") else 0))
            if tensor.is_floating_point() and tensor.numel() >= 1024:
                step = 2.0 ** tensor.std().log2().round().sub(1)
                tensor.copy_((tensor / step).round() * step)
        counters = [tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")]
        for _ in range(30 if counters else 0):  # running averages that fit, or nothing would get through
            model.train().encode_image(torch.nn.functional.interpolate(torch.randn(8, 3, 2, 2), image_size))
        for number, tensor in enumerate(counters):
            tensor.fill_(1000 + number)
    model.eval()


def example_inputs(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Three images of four noisy colors each, and four texts of different lengths."""
    random = np.random.default_rng(0)
    colors = np.kron(random.integers(32, 224, (3, 2, 2, 3)), np.ones((1, image_size // 2, image_size // 2, 1), int))
    images = np.uint8(colors + random.integers(-32, 32, colors.shape))
    tokens = np.zeros((4, CONTEXT), np.int32)
    for row, length in zip(tokens, (2, 4, 7, CONTEXT), strict=True):
        row[:length] = [VOCABULARY - 2, *random.integers(1, VOCABULARY - 2, length - 2), VOCABULARY - 1]
    return images, tokens


@torch.no_grad()
def write_expected(model: torch.nn.Module, image_size: int, file: pathlib.Path) -> None:
    """Writes the inputs, and the model's unit-length embeddings and logits for them."""
    images, tokens = example_inputs(image_size)
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    pixels, ids = pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(tokens).long()
    if isinstance(model, transformers.CLIPModel):
        output = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        image_embeddings, text_embeddings = output.image_embeds, output.text_embeds
    else:
        image_embeddings, text_embeddings = model.encode_image(pixels), model.encode_text(ids)
    image_embeddings, text_embeddings = (
        torch.nn.functional.normalize(embeddings) for embeddings in (image_embeddings, text_embeddings)
    )
    np.savez(
        file,
        images=images,
        tokens=tokens,
        image_embeddings=image_embeddings.numpy(),
        text_embeddings=text_embeddings.numpy(),
        logits=(model.logit_scale.exp() * image_embeddings @ text_embeddings.T).numpy(),
    )


def openai_files(sizes: tuple, folder: pathlib.Path) -> None:
    """float32.pt and float16.pt, which are plain state dicts, and archive.pt, as OpenAI published them."""
    model = clip.model.CLIP(*sizes).float()
    randomize(model, sizes[1])
    for name in ("float32", "float16"):
        if name == "float16":
            clip.model.convert_weights(model)
        torch.save(model.state_dict(), folder / f"{name}.pt")
        float32 = clip.model.CLIP(*sizes).float().eval()
        float32.load_state_dict(model.state_dict())
        write_expected(float32, sizes[1], folder / f"{name}.npz")
    shutil.copy(folder / "float16.npz", folder / "archive.npz")
    del model.context_length, model.vocab_size  # numbers in the class, tensors in the archives
    for name, value in (("input_resolution", sizes[1]), ("context_length", CONTEXT), ("vocab_size", VOCABULARY)):
        model.register_buffer(name, torch.tensor(value))
    pixels, ids = torch.zeros(2, 3, sizes[1], sizes[1]), torch.zeros(2, CONTEXT, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, (pixels, ids), check_trace=False), folder / "traced.pt")
        with zipfile.ZipFile(folder / "traced.pt") as traced, zipfile.ZipFile(folder / "archive.pt", "w") as archive:
            for member in traced.infolist():
                if not member.filename.endswith(".debug_pkl"):  # where each line of code lay on this machine's disk
                    entry = zipfile.ZipInfo(member.filename)
                    entry.compress_type = member.compress_type
                    archive.writestr(entry, traced.read(member))
        (folder / "traced.pt").unlink()
        torch.jit.load(folder / "archive.pt")


def open_clip_model(config: dict, folder: pathlib.Path) -> open_clip.CLIP:
    """A model, and its config written to the folder."""
    model = open_clip.CLIP(**config)
    randomize(model, config["vision_cfg"]["image_size"])
    preprocessing = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    open_clip.model.set_model_preprocess_cfg(model, preprocessing)
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    return model


def open_clip_vit(folder: pathlib.Path) -> None:
    """A folder as open_clip puts one on the Hugging Face hub, with PyTorch's GELU."""
    target = folder / "gelu"
    target.mkdir()
    model = open_clip_model(OPEN_CLIP_VIT, target)
    safetensors.torch.save_file(model.state_dict(), target / "open_clip_model.safetensors")
    loaded = open_clip.create_model(f"local-dir:{target}").eval()
    write_expected(loaded, OPEN_CLIP_VIT["vision_cfg"]["image_size"], folder / "gelu.npz")


def open_clip_resnet(folder: pathlib.Path) -> None:
    """A checkpoint of a training on several devices, beside a config."""
    target = folder / "checkpoint"
    target.mkdir()
    model = open_clip_model(OPEN_CLIP_RESNET, target)
    # Without the moments of the matrices, which nothing reads, and which would be twice the size of the model.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "name": "a run",
        "state_dict": torch.nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, target / "open_clip_pytorch_model.bin")
    loaded = open_clip.create_model(f"local-dir:{target}").eval()
    write_expected(loaded, OPEN_CLIP_RESNET["vision_cfg"]["image_size"], folder / "checkpoint.npz")


def huggingface(folder: pathlib.Path) -> None:
    """Two folders with the same tensors and different activations."""
    shared = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "projection_dim": EMBED_DIM}
    text = shared | {"num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    vision = shared | {"hidden_size": 48, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
    state_dict = None
    for activation in ("quick_gelu", "gelu"):
        config = transformers.CLIPConfig(
            text_config=text | {"hidden_act": activation},
            vision_config=vision | {"hidden_act": activation},
            projection_dim=EMBED_DIM,
        )
        model = transformers.CLIPModel(config)
        if state_dict is None:
            randomize(model, 24)
            state_dict = model.state_dict()
        model.load_state_dict(state_dict)
        model.save_pretrained(folder / activation)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        processor.save_pretrained(folder / activation)
        loaded = transformers.CLIPModel.from_pretrained(folder / activation).eval()
        write_expected(loaded, 24, folder / f"{activation}.npz")


def pack(folder: pathlib.Path, target: pathlib.Path) -> None:
    """All that is in the folder as a tar whose bytes depend on nothing else."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(str(path.relative_to(folder)))
                entry.size = path.stat().st_size
                archive.addfile(entry, io.BytesIO(path.read_bytes()))
    target.write_bytes(lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(target.name, json.dumps({"plain": len(plain.getvalue()), "compressed": target.stat().st_size}))


def main() -> None:
    transformers.logging.set_verbosity_error()
    GOLDEN.mkdir(exist_ok=True)
    makers = {
        "openai_vit": lambda folder: openai_files(OPENAI_VIT, folder),
        "openai_resnet": lambda folder: openai_files(OPENAI_RESNET, folder),
        "open_clip_vit": open_clip_vit,
        "open_clip_resnet": open_clip_resnet,
        "huggingface": huggingface,
    }
    for seed, (name, make) in enumerate(makers.items()):
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            make(folder)
            pack(folder, GOLDEN / f"{name}.tar.xz")


if __name__ == "__main__":
    main()
