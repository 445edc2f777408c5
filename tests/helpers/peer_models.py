"""PyTorch's CLIPs with random weights, and what they make of a batch: what the comparisons with peers share."""

import numpy as np
import open_clip
import torch
import transformers
from clip import model as openai

from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.weights import huggingface
from clip_jax.weights import open_clip as open_clip_files


def openai_model(preset: CLIPPreset) -> torch.nn.Module:
    """OpenAI's own class, float32."""
    vision, text = preset.vision, preset.text
    layers = vision.stage_sizes if isinstance(vision, ResNetPreset) else vision.num_layers
    patch_size = getattr(vision, "patch_size", None)
    model = openai.CLIP(
        *(preset.embed_dim, vision.image_size, layers, vision.width, patch_size),
        *(text.context_length, text.vocab_size, text.width, text.num_heads, text.num_layers),
    )
    return enliven(model.float())


def open_clip_model(preset: CLIPPreset, name: str | None = None) -> torch.nn.Module:
    """open_clip's own class: by its name for the architecture, or by a config."""
    config = open_clip.get_model_config(name) if name else open_clip_files.config_of(preset)["model_cfg"]
    return enliven(open_clip.CLIP(**config))


def hugging_face_model(preset: CLIPPreset) -> torch.nn.Module:
    """transformers' own class."""
    return enliven(transformers.CLIPModel(transformers.CLIPConfig(**huggingface.config_of(preset))))


def enliven(model: torch.nn.Module) -> torch.nn.Module:
    """Moves what starts at 0 or 1, where exchanging two tensors would not show; in evaluation mode."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.1, 0.3)  # about what PyTorch's initial convolutions leave of a variance of 1
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("bn3.weight"):  # at 0 a residual branch would say nothing
                parameter.add_(0.5)
    return model.eval()


def random_batch(preset: CLIPPreset, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized images float32 ``[B, H, W, 3]`` of coarse and fine structure, and tokens int32 ``[B, L]``."""
    random = np.random.default_rng(0)
    side, length, vocab_size = preset.vision.image_size, preset.text.context_length, preset.text.vocab_size
    coarse = random.normal(size=(size, 8, 8, 3)).repeat(-(-side // 8), axis=1).repeat(-(-side // 8), axis=2)
    images = coarse[:, :side, :side] + 0.5 * random.normal(size=(size, side, side, 3))
    tokens = np.zeros((size, length), np.int32)
    for row, used in zip(tokens, np.linspace(2, length, size).astype(int), strict=True):
        row[:used] = [vocab_size - 2, *random.integers(0, vocab_size - 2, used - 2), vocab_size - 1]
    return images.astype(np.float32), tokens


def as_torch(images: np.ndarray, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(tokens).long()


def embed(model: torch.nn.Module, images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """image_embeddings, text_embeddings and logits of one of the models above."""
    pixels, ids = as_torch(images, tokens)
    with torch.inference_mode():
        if isinstance(model, transformers.CLIPModel):
            output = model(input_ids=ids, pixel_values=pixels)
            image_embeddings, text_embeddings = output.image_embeds, output.text_embeds
            logits = output.logits_per_image
        else:
            image_embeddings = torch.nn.functional.normalize(model.encode_image(pixels))
            text_embeddings = torch.nn.functional.normalize(model.encode_text(ids))
            logits = model.logit_scale.exp() * image_embeddings @ text_embeddings.T
    return tuple(array.numpy() for array in (image_embeddings, text_embeddings, logits))


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
