"""Both towers and every gradient, against ``clip.model.CLIP`` with the same weights. Needs the peers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset, TextTransformerPreset, VisionTransformerPreset
from clip_jax.training.loss import contrastive_loss

torch = pytest.importorskip("torch")
pytest.importorskip("clip")
from clip import model as openai  # noqa: E402

PATCH, CONTEXT, VOCABULARY = 16, 77, 49_408
PRESET = CLIPPreset(
    64,
    VisionTransformerPreset(image_size=64, patch_size=PATCH, width=128, num_layers=3, num_heads=2),
    TextTransformerPreset(width=128, num_layers=2, num_heads=2),
)


def tower_blocks(tensors, prefix, num_layers):
    """The layers under ``prefix`` stacked along a new first axis; linear weights turned to ``[in, out]``."""

    def stack(name, transpose):
        layers = [tensors[f"{prefix}.{layer}.{name}"] for layer in range(num_layers)]
        return np.stack([layer.T if transpose else layer for layer in layers])

    def linear(weight, bias):
        return {"kernel": stack(weight, True), "bias": stack(bias, False)}

    def norm(name):
        return {"scale": stack(f"{name}.weight", False), "bias": stack(f"{name}.bias", False)}

    return {
        "blocks": {
            "ln_1": norm("ln_1"),
            "qkv": linear("attn.in_proj_weight", "attn.in_proj_bias"),
            "attention_output": linear("attn.out_proj.weight", "attn.out_proj.bias"),
            "ln_2": norm("ln_2"),
            "fc1": linear("mlp.c_fc.weight", "mlp.c_fc.bias"),
            "fc2": linear("mlp.c_proj.weight", "mlp.c_proj.bias"),
        }
    }


def to_our_tree(tensors):
    """OpenAI's names and layouts to ours; gradients by its parameters map like the parameters themselves."""

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    patches = tensors["visual.conv1.weight"].transpose(2, 3, 1, 0)  # [out, channel, row, column] to ours
    return {
        "vision": {
            "patch_embedding": {"kernel": patches.reshape(-1, PRESET.vision.width)},
            "class_embedding": tensors["visual.class_embedding"],
            "positional_embedding": tensors["visual.positional_embedding"],
            "ln_pre": norm("visual.ln_pre"),
            "transformer": tower_blocks(tensors, "visual.transformer.resblocks", PRESET.vision.num_layers),
            "ln_post": norm("visual.ln_post"),
            "projection": {"kernel": tensors["visual.proj"]},
        },
        "text": {
            "token_embedding": tensors["token_embedding.weight"],
            "positional_embedding": tensors["positional_embedding"],
            "transformer": tower_blocks(tensors, "transformer.resblocks", PRESET.text.num_layers),
            "ln_final": norm("ln_final"),
            "projection": {"kernel": tensors["text_projection"]},
        },
        "logit_scale": tensors["logit_scale"],
    }


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def both():
    """OpenAI's embeddings, logits and gradients for a batch, and ours from the same weights."""
    torch.manual_seed(0)
    vision, text = PRESET.vision, PRESET.text
    peer = openai.CLIP(
        PRESET.embed_dim,
        *(vision.image_size, vision.num_layers, vision.width, vision.patch_size),
        *(CONTEXT, VOCABULARY, text.width, text.num_heads, text.num_layers),
    ).float()
    with torch.no_grad():  # gains and biases start at 1 and 0, where exchanging two would not show
        for name, parameter in peer.named_parameters():
            if name.endswith("bias") or ".ln_" in name or name.startswith("ln_"):
                parameter.add_(0.1 * torch.randn_like(parameter))

    random = np.random.default_rng(0)
    images = random.normal(size=(6, 64, 64, 3)).astype(np.float32)
    tokens = np.zeros((6, CONTEXT), np.int32)
    for row, length in zip(tokens, (2, 5, 9, 30, 76, 77), strict=True):
        row[:length] = [VOCABULARY - 2, *random.integers(0, VOCABULARY - 2, length - 2), VOCABULARY - 1]

    pixels, ids = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens).long()
    logits, transposed = peer(pixels, ids)
    targets = torch.arange(6)
    loss = (
        torch.nn.functional.cross_entropy(logits, targets) + torch.nn.functional.cross_entropy(transposed, targets)
    ) / 2
    loss.backward()
    with torch.no_grad():
        embeddings = [
            torch.nn.functional.normalize(x).numpy() for x in (peer.encode_image(pixels), peer.encode_text(ids))
        ]
    theirs = {
        "image_embeddings": embeddings[0],
        "text_embeddings": embeddings[1],
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
        "gradients": flat(to_our_tree({name: p.grad.numpy() for name, p in peer.named_parameters()})),
    }

    model = CLIP(PRESET)
    params = jax.tree.map(jnp.array, to_our_tree({name: p.detach().numpy() for name, p in peer.named_parameters()}))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))

    @jax.jit
    def run(params):
        def objective(params):
            outputs = model.apply({"params": params}, images, tokens)
            return contrastive_loss(*outputs, mesh)[0], outputs

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, (image_embeddings, text_embeddings, logit_scale)), gradients = run(params)
    ours = {
        "image_embeddings": np.asarray(image_embeddings),
        "text_embeddings": np.asarray(text_embeddings),
        "logits": np.asarray(jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T),
        "loss": float(loss),
        "gradients": flat(gradients),
        "params": params,
    }
    return ours, theirs


def test_the_mapped_tree_is_that_of_our_model(both):
    expected = jax.eval_shape(
        CLIP(PRESET).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, CONTEXT), jnp.int32)
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.meta.unbox(expected)["params"])
    assert jax.tree.map(lambda leaf: leaf.shape, both[0]["params"]) == shapes


@pytest.mark.parametrize("name", ["image_embeddings", "text_embeddings"])
def test_embeddings_are_those_of_openais_model(both, name):
    ours, theirs = (side[name] for side in both)
    assert (1 - (np.float64(ours) * theirs).sum(axis=1) < 1e-5).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs[:, None] - theirs[None]).max(axis=2)[np.triu_indices(6, 1)].min() > 1e-3


def test_logits_and_loss_are_those_of_openais_model(both):
    ours, theirs = both
    np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=0, atol=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_the_gradient_by_every_tensor_is_that_of_openais_model(both):
    ours, theirs = (side["gradients"] for side in both)
    assert ours.keys() == theirs.keys()
    errors = {
        name: np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient) for name, gradient in theirs.items()
    }
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}
