"""One training step's loss and gradient by every tensor, against OpenAI's class with the same weights."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax.losses import default_section, make_loss
from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import openai
from clip_jax.weights.mapping import to_tensors, to_variables

torch = pytest.importorskip("torch")
peer_models = pytest.importorskip("peer_models")

TEXT = TextTransformerPreset(width=128, num_layers=2, num_heads=2)
PRESETS = {
    "ViT": CLIPPreset(64, VisionTransformerPreset(64, patch_size=16, width=128, num_layers=3, num_heads=2), TEXT),
    "ResNet": CLIPPreset(64, ResNetPreset(64, width=8, stage_sizes=(1, 2, 1, 2), num_heads=4), TEXT),
}
BATCH = 6
MARGIN = 2e-6


def torch_loss(model, images, tokens):
    """The symmetric cross-entropy of figure 3, and both ways' logits."""
    logits, transposed = model(*peer_models.as_torch(images, tokens))
    targets = torch.arange(len(tokens))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, targets) + cross_entropy(transposed, targets)) / 2, logits


def attempt(preset, seed, images, tokens):
    """A model, its tensors, loss and logits; None if rounding could move an input of a ReLU to the other side of zero.

    One that does is no error, but changes the gradients by more than all the rounding together.
    """
    torch.manual_seed(seed)
    peer = peer_models.openai_model(preset).train()
    before = {name: array.copy() for name, array in peer_models.tensors_of(peer).items()}
    margins = [1.0]
    for module in peer.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_pre_hook(lambda _, inputs: margins.append(inputs[0].abs().min().item()))
    loss, logits = torch_loss(peer, images, tokens)
    return (peer, before, loss, logits) if min(margins) > MARGIN else None


@pytest.fixture(scope="module", params=PRESETS)
def both(request):
    """OpenAI's logits, loss, gradients and running averages after a step's forward and backward pass, and ours."""
    preset = PRESETS[request.param]
    images, tokens = peer_models.random_batch(preset, BATCH)
    peer, before, loss, logits = next(filter(None, (attempt(preset, seed, images, tokens) for seed in range(50))))
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    theirs = {
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
        "gradients": gradients,
        "buffers": {
            name: buffer.numpy() for name, buffer in peer.named_buffers() if "running" in name or "num" in name
        },
    }

    model, variables = CLIP(preset), to_variables(before, openai.TABLE, preset)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    loss_of = make_loss(default_section(), mesh, len(images), "float32")

    @jax.jit
    def run(params):
        def objective(params):
            outputs, updated = model.apply(
                variables | {"params": params}, images, tokens, train=True, mutable=["batch_stats"]
            )
            *embeddings, logit_scale = outputs
            return loss_of(*embeddings, {"logit_scale": logit_scale})[0], (outputs, updated)

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, ((image_embeddings, text_embeddings, logit_scale), updated)), gradients = run(variables["params"])
    ours = {
        "logits": np.exp(logit_scale) * image_embeddings @ text_embeddings.T,
        "loss": float(loss),
        # Gradients have the layouts of their tensors.
        "gradients": to_tensors({"params": gradients, "batch_stats": variables["batch_stats"]}, openai.TABLE, preset),
        "buffers": to_tensors(variables | updated, openai.TABLE, preset),
    }
    return ours, theirs


def test_logits_and_loss_of_a_training_step_are_those_of_openais_model(both):
    ours, theirs = both
    np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=0, atol=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def relative_errors(ours, theirs):
    assert theirs.keys() <= ours.keys()

    def size(name):
        # Softmax does not see what is added to all keys: the gradient by their bias is 0 but for rounding.
        return np.linalg.norm(theirs[name.replace("k_proj.bias", "k_proj.weight")])

    return {name: np.linalg.norm(ours[name] - array) / size(name) for name, array in theirs.items()}


def test_the_gradient_by_every_tensor_is_that_of_openais_model(both):
    errors = relative_errors(both[0]["gradients"], both[1]["gradients"])
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


def test_running_averages_move_as_in_openais_model(both):
    errors = relative_errors(both[0]["buffers"], both[1]["buffers"])
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
