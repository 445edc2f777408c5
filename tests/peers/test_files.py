"""What is written here, the other programs load without a flag, and compute the same from an image and a text."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.convert import loading_example
from clip_jax.convert import main as convert
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import PRESETS, CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import Weights, openai, preset_name, read_weights, write_weights
from clip_jax.weights import open_clip as open_clip_files
from clip_jax.weights.mapping import to_variables

torch = pytest.importorskip("torch")
peer_models = pytest.importorskip("peer_models")
clip, open_clip, transformers = (pytest.importorskip(name) for name in ("clip", "open_clip", "transformers"))

TEXT = TextTransformerPreset(width=128, num_layers=2, num_heads=2)
VIT = CLIPPreset(32, VisionTransformerPreset(64, patch_size=16, width=128, num_layers=2, num_heads=2), TEXT)
VIT_GELU = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, activation="gelu", mlp_ratio=4.3637),
    text=dataclasses.replace(TEXT, activation="gelu", num_heads=4),
)
RESNET = CLIPPreset(32, ResNetPreset(96, width=16, stage_sizes=(1, 2, 1, 3), num_heads=8), TEXT)
SHORT = dataclasses.replace(VIT, text=dataclasses.replace(TEXT, context_length=24))
TEXTS = ["a photo of a cat", "Two DOGS & a café, 1999!", "x"]


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)


def model_folder(preset, folder):
    """Random weights as a folder of ours, as a training leaves it but for the optimizer; and loaded."""
    torch.manual_seed(0)
    tensors = peer_models.tensors_of(peer_models.open_clip_model(preset))
    write_weights(Weights(preset, to_variables(tensors, openai.TABLE, preset), "test"), folder, "clip_jax")
    return clip_jax.load(folder)


def assert_same(ours, image, image_embeddings, text_embeddings, scale):
    for result, expected in (
        (ours.encode_image(image), image_embeddings),
        (ours.encode_text(TEXTS), text_embeddings),
    ):
        expected = torch.nn.functional.normalize(expected).detach().numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
        assert (1 - (np.float64(result) * expected).sum(axis=1) < 1e-5).all()
    assert ours.logit_scale == pytest.approx(scale.exp().item(), rel=1e-6)


@pytest.mark.parametrize("preset", [VIT, VIT_GELU, RESNET, SHORT], ids=["ViT", "gelu", "ResNet", "short"])
def test_open_clip_loads_a_folder(preset, image, tmp_path):
    ours = model_folder(preset, tmp_path / "ours")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs", "--to=open_clip"]) == 0
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/theirs")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path}/theirs")
    with torch.inference_mode():
        image_embeddings = model.eval().encode_image(transform(image)[None])
        text_embeddings = model.encode_text(tokenize(TEXTS))
    assert_same(ours, image, image_embeddings, text_embeddings, model.logit_scale)


def with_activation(preset, activation):
    towers = {
        name: dataclasses.replace(tower, activation=activation) if tower.activation else tower
        for name, tower in (("vision", preset.vision), ("text", preset.text))
    }
    return dataclasses.replace(preset, **towers)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", PRESETS)
def test_open_clip_knows_the_name_that_is_printed_as_the_same_architecture(name, activation):
    preset = with_activation(PRESETS[name], activation)
    use = loading_example(preset_name(preset), {}, Preprocessing(), "a.safetensors", "open_clip")
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    printed = re.match(r'open_clip.create_model_and_transforms\("(.+?)"(, force_quick_gelu=True)?, pretrained=', use)
    if printed:
        config = configs[printed[1]] | ({"quick_gelu": True} if printed[2] else {})
        assert open_clip_files.read_config(config) == preset
    else:
        assert "python -m clip_jax.convert a.safetensors a --to=open_clip" in use
        assert preset not in [
            open_clip_files.read_config(config)
            for config in configs.values()
            if config["embed_dim"] == preset.embed_dim
        ]


def test_the_printed_command_loads_a_file_in_open_clip(tmp_path, capsys):
    """The one preset of which they have the plain activation alone, with the bias of a sigmoid loss."""
    torch.manual_seed(0)
    preprocessing = Preprocessing((0.5,) * 3, (0.25, 0.5, 1.0), "squash", "bilinear")
    preset = dataclasses.replace(PRESETS["ViT-S/16"], preprocessing=preprocessing)
    tensors = peer_models.tensors_of(peer_models.open_clip_model(preset)) | {"logit_bias": np.float32(-9.5)}
    weights = Weights(preset, to_variables(tensors, open_clip_files.TABLE, preset), "test")
    write_weights(weights, tmp_path / "ours", "clip_jax")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs.safetensors", "--to=open_clip"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("Use it:  ")
    model, _, transform = eval(command, {"open_clip": open_clip})
    assert (transform.transforms[-1].mean, transform.transforms[-1].std) == ((0.5,) * 3, (0.25, 0.5, 1.0))
    assert transform.transforms[0].size == (224, 224)  # squashed: not the short side alone
    assert model.logit_bias.item() == -9.5
    _, tokens = peer_models.random_batch(preset, 2)
    model = model.eval()
    with torch.inference_mode():
        theirs = model.encode_text(torch.from_numpy(tokens).long(), normalize=True).numpy()
    np.testing.assert_allclose(clip_jax.load(tmp_path / "ours").encode_text(tokens), theirs, rtol=0, atol=1e-4)


def test_tensors_are_taken_as_arrays_are(image, tmp_path):
    model = model_folder(SHORT, tmp_path / "ours")
    pixels = torch.from_numpy(np.array(image))
    expected = model.encode_image(image)
    for images in (pixels, pixels[None], [pixels], pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        np.testing.assert_array_equal(model.encode_image(images), expected)
    for wrong in (pixels.permute(2, 0, 1), pixels / 255, pixels.bfloat16(), (pixels / 255).requires_grad_()):
        with pytest.raises(ValueError, match=r"an image must be an array uint8 \[H, W, 3\], not"):
            model.encode_image(wrong)
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)  # int64 [3, 77] for a context of 24
    np.testing.assert_array_equal(model.encode_text(tokens), model.encode_text(TEXTS))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.encode_text(tokens.float())
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.encode_text(tokens.bfloat16())


def test_open_clip_has_the_bias_of_a_sigmoid_loss(image, tmp_path):
    model_folder(VIT, tmp_path / "plain")
    plain = read_weights(tmp_path / "plain")
    params = plain.variables["params"] | {"logit_bias": np.float32(-9.5)}
    write_weights(plain._replace(variables=plain.variables | {"params": params}), tmp_path / "ours", "clip_jax")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs", "--to=open_clip"]) == 0
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/theirs")
    assert model.logit_bias.item() == -9.5
    with torch.inference_mode():
        image_embeddings = model.eval().encode_image(transform(image)[None])
        text_embeddings = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}/theirs")(TEXTS))
    assert_same(clip_jax.load(tmp_path / "ours"), image, image_embeddings, text_embeddings, model.logit_scale)


# The printed command's test has a Vision Transformer.
@pytest.mark.parametrize("name", [pytest.param("ViT-B-32-quickgelu", marks=pytest.mark.slow), "RN50-quickgelu"])
def test_open_clip_loads_a_single_file_by_the_models_name(name, image, tmp_path):
    preset = open_clip_files.read_config({"model_cfg": open_clip.get_model_config(name)})
    assert preset in PRESETS.values()
    ours = model_folder(preset, tmp_path / "ours")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs.safetensors", "--to=open_clip"]) == 0
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=f"{tmp_path}/theirs.safetensors")
    with torch.inference_mode():
        image_embeddings = model.eval().encode_image(transform(image)[None])
        text_embeddings = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    assert_same(ours, image, image_embeddings, text_embeddings, model.logit_scale)


@pytest.mark.parametrize("preset", [VIT, VIT_GELU, SHORT], ids=["ViT", "gelu", "short"])
def test_transformers_loads_a_folder(preset, image, tmp_path):
    ours = model_folder(preset, tmp_path / "ours")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs", "--to=huggingface"]) == 0
    model, report = transformers.CLIPModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())  # nothing missing, nothing left over
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "theirs")
    inputs = processor(text=TEXTS, images=image, return_tensors="pt", padding="max_length")
    tokens = clip_jax.tokenize(TEXTS, preset.text.context_length)
    until_the_end = np.cumsum(tokens == tokens.max(), axis=1) == 0
    assert inputs["input_ids"].shape == tokens.shape
    assert (inputs["input_ids"].numpy() == tokens)[until_the_end].all()
    with torch.inference_mode():
        output = model.eval()(**inputs)
    assert_same(ours, image, output.image_embeds, output.text_embeds, model.logit_scale)
    theirs = output.logits_per_image.softmax(dim=1).numpy()
    # Its processor resizes with PyTorch instead of PIL, which moves pixels by a level here and there.
    np.testing.assert_allclose(theirs, ours.classify(image, TEXTS), rtol=0, atol=2e-3)


@pytest.mark.parametrize("preset", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_openais_program_loads_a_file(preset, image, tmp_path):
    ours = model_folder(preset, tmp_path / "ours")
    assert convert([f"{tmp_path}/ours", f"{tmp_path}/theirs.pt", "--to=openai"]) == 0
    state = torch.load(tmp_path / "theirs.pt", weights_only=True)
    model = clip.model.build_model(state).float()
    transform = clip.clip._transform(model.visual.input_resolution)
    with torch.inference_mode():
        image_embeddings = model.encode_image(transform(image)[None])
        text_embeddings = model.encode_text(clip.tokenize(TEXTS, preset.text.context_length))
    # build_model rounds the matrices to half precision.
    for result, expected in (
        (ours.encode_image(image), image_embeddings),
        (ours.encode_text(TEXTS), text_embeddings),
    ):
        expected = torch.nn.functional.normalize(expected).numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=5e-3)
    path_of_the_program, _ = clip.load(str(tmp_path / "theirs.pt"), device="cpu")
    assert path_of_the_program.visual.input_resolution == preset.vision.image_size


@pytest.mark.usefixtures("full_compilation")  # which rounds less
@pytest.mark.parametrize(("before", "after"), [((4, 3), 7), ((7, 3), 4), ((16, 2), 24), ((24, 2), 16)])
def test_positions_are_resized_as_open_clip_resizes_them(before, after):
    from clip_jax.models.positions import resize_positions

    side, width = before
    positions = np.random.default_rng(0).normal(size=(1 + side * side, width)).astype(np.float32)
    state = {"visual.positional_embedding": torch.from_numpy(positions)}

    class Visual:
        grid_size = (after, after)

    class Model:
        visual = Visual

    open_clip.model.resize_pos_embed(state, Model, antialias=True)
    expected = state["visual.positional_embedding"].numpy()
    np.testing.assert_allclose(resize_positions(positions, after), expected, rtol=0, atol=2e-6)
