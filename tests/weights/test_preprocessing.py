"""How images are prepared, from the configs beside weights and back into them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from goldens import MODELS
from PIL import Image

import clip_jax
from clip_jax.config import check_same_run, default_config, override, to_json, validate
from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from clip_jax.models.presets import preset_from_dict
from clip_jax.training.preparation import read_initial_variables
from clip_jax.weights import Weights, WeightsError, open_clip, read_weights, write_weights
from clip_jax.weights.resizing import at_image_size

pytestmark = pytest.mark.usefixtures("one_device")

HUGGING_FACE, OPEN_CLIP = "huggingface/gelu", "open_clip_vit/gelu"
HALF = (0.5, 0.5, 0.5)
SIZES = {"size": 24, "crop_size": 24}  # those of the model


def folder_with(goldens, tmp_path, name, **files):
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(goldens[name].path, folder)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1]}, {"mean": HALF, "std": (0.25, 0.5, 1.0)}),
        ({"image_mean": 0.5, "image_std": 0.5}, {"mean": HALF, "std": HALF}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({"resample": 0}, {"interpolation": "nearest"}),
        ({"size": {"shortest_edge": 24}}, {}),
        ({"size": {"shortest_edge": 28}}, {"resize_size": 28}),
        ({"size": 28}, {"resize_size": 28}),
        ({"size": 20}, {"resize_size": 20}),  # padded to 24
        ({"size": {"height": 24, "width": 24}}, {"resize_mode": "squash"}),
        ({"size": {"height": 28, "width": 28}}, {"resize_mode": "squash", "resize_size": 28}),
        ({"size": {"height": 24, "width": 24}, "do_center_crop": False}, {"resize_mode": "squash"}),
        ({"size": [24, 24]}, {"resize_mode": "squash"}),
        ({"size": 24, "default_to_square": True}, {"resize_mode": "squash"}),
        ({"crop_size": {"height": 24, "width": 24}}, {}),
        ({"image_processor_type": "CLIPImageProcessorFast", "feature_extractor_type": "CLIPFeatureExtractor"}, {}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"do_normalize": False, "do_rescale": False}, {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}),
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3},
            {"mean": HALF, "std": HALF},
        ),
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_what_an_image_processor_says_is_read(goldens, tmp_path, content, expected, file):
    content = SIZES | content
    folder = folder_with(goldens, tmp_path, HUGGING_FACE)
    (folder / "preprocessor_config.json").unlink()
    for whole in [content, {"image_processor": content}] if file == "processor_config" else [content]:
        (folder / f"{file}.json").write_text(json.dumps(whole))
        read = dataclasses.asdict(read_weights(folder).preset.preprocessing)
        wanted = dataclasses.asdict(Preprocessing()) | expected
        for name in ("mean", "std"):
            assert read.pop(name) == pytest.approx(wanted.pop(name), abs=1e-12)
        assert read == wanted


@pytest.mark.parametrize(
    "other",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_normalize": 1},
        {"do_pad": True},
        {"do_sharpen": True},
        {"resample": 6},
        {"resample": "bicubic"},
        {"rescale_factor": "x"},
        {"rescale_factor": 0},
        {"image_mean": "0.5"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0, 0.5]},
        {"image_std": [0.5, float("nan"), 0.5]},
        {"size": {"longest_edge": 24}},
        {"size": {"shortest_edge": 24, "longest_edge": 24}},
        {"size": {"height": 24, "width": 28}},
        {"size": {"shortest_edge": "24"}},
        {"crop_size": {"height": 28, "width": 28}},
        {"crop_size": None},
        {"crop_size": {"height": 24, "width": 24, "depth": 3}},
        {"image_processor_type": "SiglipImageProcessor"},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"auto_map": {"AutoImageProcessor": "mine.py"}},
        {"size": {"shortest_edge": 0}},
        {"size": {"shortest_edge": -5}},
        {"size": {"shortest_edge": 10**9}},
        {"size": {"shortest_edge": {"height": 24, "width": 24}}},
        {"image_std": [1e-50] * 3},
        {"rescale_factor": 1e-300},
        {"image_mean": 10**400},
        {"image_mean": None},
        {"size": None},
        {"size": 24 * 9},
    ],
)
def test_what_is_not_built_here_is_refused_by_its_field(goldens, tmp_path, other):
    for file, content in (
        ("preprocessor_config", SIZES | other),
        ("processor_config", {"image_processor": SIZES | other}),
    ):
        folder = folder_with(goldens, tmp_path, HUGGING_FACE, **{file: content})
        with pytest.raises(WeightsError, match=rf"{file}\.json.*{next(iter(other))}"):
            read_weights(folder)


def test_a_folder_without_an_image_processor_is_noted(goldens, tmp_path):
    folder = folder_with(goldens, tmp_path, HUGGING_FACE, preprocessor_config=SIZES | {"image_std": 0.5})
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    weights = read_weights(folder)
    assert weights.preset.preprocessing.std == HALF and weights.note == ""
    (folder / "preprocessor_config.json").unlink()
    weights = read_weights(folder)
    assert weights.preset.preprocessing == Preprocessing() and "does not state how images are prepared" in weights.note
    (folder / "processor_config.json").write_text('{"image_processor": "CLIPImageProcessor"}')
    with pytest.raises(
        WeightsError, match=r"processor_config.json: image_processor='CLIPImageProcessor' is not a mapping"
    ):
        read_weights(folder)


def test_two_files_that_differ_are_refused(goldens, tmp_path):
    files = {"preprocessor_config": SIZES, "processor_config": {"image_processor": SIZES | {"image_std": 0.5}}}
    with pytest.raises(WeightsError, match=r"preprocessor_config.json and processor_config.json differ"):
        read_weights(folder_with(goldens, tmp_path, HUGGING_FACE, **files))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}, {"mean": HALF, "std": HALF}),
        ({"mean": 0.5, "std": None}, {"mean": HALF}),
        ({"interpolation": "bilinear"}, {}),
        ({"interpolation": "random"}, {"interpolation": "bicubic"}),
        ({"resize_mode": "longest", "fill_color": 128}, {}),
        ({"size": [32, 32], "mode": "RGB"}, {}),
    ],
)
def test_what_open_clips_config_says_is_read(goldens, tmp_path, content, expected):
    config = open_clip.config_of(MODELS[OPEN_CLIP].preset) | {"preprocess_cfg": content}
    read = read_weights(folder_with(goldens, tmp_path, OPEN_CLIP, open_clip_config=config)).preset.preprocessing
    same = {key: value for key, value in content.items() if key in ("resize_mode", "fill_color", "interpolation")}
    assert read == dataclasses.replace(Preprocessing(), **(same | expected))


@pytest.mark.parametrize(
    "other",
    [
        {"size": 28},
        {"mode": "L"},
        {"interpolation": "lanczos"},
        {"resize_mode": "stretch"},
        {"fill_color": 256},
        {"mean": [0.5]},
        {"std": [0, 1, 1]},
        {"sharpen": 1},
        {"interpolation": ["bicubic"]},
        {"resize_mode": ["squash"]},
    ],
)
def test_what_open_clip_does_not_know_is_refused_by_its_field(goldens, tmp_path, other):
    config = open_clip.config_of(MODELS[OPEN_CLIP].preset) | {"preprocess_cfg": other}
    folder = folder_with(goldens, tmp_path, OPEN_CLIP, open_clip_config=config)
    with pytest.raises(WeightsError, match=rf"open_clip_config.json: preprocess_cfg.*{next(iter(other))}"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("preprocessing", "refusing"),
    [
        (Preprocessing(HALF, (0.25, 0.5, 1.0), "squash", "bilinear"), {"openai"}),
        (Preprocessing(resize_size=28), {"openai", "open_clip"}),
        (Preprocessing(resize_size=20, fill_color=9), {"openai", "open_clip", "huggingface"}),
        (Preprocessing(interpolation="lanczos"), {"openai", "open_clip"}),
        (Preprocessing(resize_mode="longest", fill_color=128), {"openai", "huggingface"}),
    ],
)
def test_each_format_gives_it_back_or_refuses_to_write_it(goldens, tmp_path, preprocessing, refusing):
    read = read_weights(goldens["openai_vit/float32"].path)
    weights = Weights(dataclasses.replace(read.preset, preprocessing=preprocessing), read.variables, "test")
    for format, name in (  # noqa: A001
        ("clip_jax", "ours"),
        ("open_clip", "folder"),
        ("open_clip", "file.safetensors"),
        ("huggingface", "hf"),
        ("openai", "file.pt"),
    ):
        if format in refusing:
            with pytest.raises(WeightsError):
                write_weights(weights, tmp_path / name, format)
            assert not (tmp_path / name).exists()
        else:
            write_weights(weights, tmp_path / name, format)
            assert read_weights(tmp_path / name).preset.preprocessing == preprocessing, name


def test_a_run_of_before_there_was_a_choice_has_openais():
    model = default_config("ViT-tiny").model.to_dict()
    assert preset_from_dict(model).preprocessing == Preprocessing(IMAGE_MEAN, IMAGE_STD)
    model["preprocessing"]["resize_size"] = model["vision"]["image_size"]
    assert preset_from_dict(model).preprocessing == Preprocessing()
    del model["preprocessing"]
    assert preset_from_dict(model).preprocessing == Preprocessing()
    config = default_config("ViT-tiny")
    saved = json.loads(to_json(config))
    del saved["model"]["preprocessing"]
    check_same_run(config, saved, "runs/old")
    override(config, "model.preprocessing.std", "1,1,1")
    with pytest.raises(ValueError, match=r"model\.preprocessing\.std was"):
        check_same_run(config, saved, "runs/old")


def test_a_training_can_be_told_how_images_are_prepared():
    config = default_config("ViT-tiny")
    config.data.source = "digits:train"
    override(config, "model.preprocessing.mean", "0.5,0.5,0.25")
    override(config, "model.preprocessing.resize_mode", "squash")
    validate(config)
    assert preset_from_dict(config.model.to_dict()).preprocessing.mean == (0.5, 0.5, 0.25)
    for name, value, words in (
        ("mean", "0.5,0.5", "three numbers"),
        ("std", "1,0,1", "must be at least 1e-06"),
        ("mean", "nan,0,0", "finite"),
        ("resize_mode", "stretch", "shortest, longest, squash"),
        ("interpolation", "cubic", "bicubic"),
        ("fill_color", "256", "[0, 255]"),
        ("resize_size", "100000", "[0, 256]"),
    ):
        changed = config.copy_and_resolve_references()
        override(changed, f"model.preprocessing.{name}", value)
        with pytest.raises(ValueError, match="preprocessing") as caught:
            validate(changed)
        assert name in str(caught.value) and words in str(caught.value)
    with pytest.raises(ValueError, match=r"mean=a,b,c: must be a number, \.\.\.$"):
        override(config, "model.preprocessing.mean", "a,b,c")


def test_a_start_from_images_prepared_otherwise_names_what_to_set(goldens, tmp_path):
    read = read_weights(goldens["openai_vit/float32"].path)
    preset = dataclasses.replace(read.preset, preprocessing=Preprocessing(HALF, resize_mode="squash"))
    write_weights(Weights(preset, read.variables, "test"), tmp_path / "start", "clip_jax")
    config = default_config("ViT-tiny")
    with config.unlocked():
        config.model.update(dataclasses.asdict(read.preset))
    config.init_from = f"{tmp_path}/start"
    with pytest.raises(ValueError, match="prepared in another way; set ") as caught:
        read_initial_variables(config)
    settings = str(caught.value).partition("set ")[2].split(" ")
    assert len(settings) == 2
    for setting in settings:
        name, _, value = setting.removeprefix("--config.").partition("=")
        override(config, name, value)
    assert read_initial_variables(config)
    # A bare file does not state it: it is taken as what the config has.
    config.init_from = str(goldens["openai_vit/float32"].path)
    assert read_initial_variables(config)


def test_another_image_size_needs_a_resize_size_in_proportion(goldens):
    read = read_weights(goldens["openai_vit/archive"].path)
    start = dataclasses.replace(read.preset, preprocessing=Preprocessing(resize_size=32))
    larger = dataclasses.replace(start, vision=dataclasses.replace(start.vision, image_size=48))
    with pytest.raises(WeightsError, match=r"set --config.model.preprocessing.resize_size=64$"):
        at_image_size(read.variables, start, larger)
    assert at_image_size(
        read.variables, start, dataclasses.replace(larger, preprocessing=Preprocessing(resize_size=64))
    )


def test_embeddings_follow_the_preprocessing(goldens, tmp_path):
    """With mean 51 / 255 and deviation 1 / 2 an image is what 2 (x - 51) is with mean 0 and deviation 1."""
    read = read_weights(goldens["openai_vit/float32"].path)
    models = {}
    for name, mean, std in (("half", 0.2, 0.5), ("plain", 0.0, 1.0)):
        preset = dataclasses.replace(read.preset, preprocessing=Preprocessing((mean,) * 3, (std,) * 3))
        write_weights(Weights(preset, read.variables, "test"), tmp_path / name, "clip_jax")
        models[name] = clip_jax.load(tmp_path / name)
    image = np.random.default_rng(0).integers(51, 178, (24, 24, 3), dtype=np.uint8)
    expected = models["plain"].encode_image(2 * (image - 51))
    np.testing.assert_allclose(models["half"].encode_image(image), expected, rtol=0, atol=1e-5)
    assert np.abs(models["plain"].encode_image(image) - expected).max() > 1e-2


def images_of_unusual_modes():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(noise[:, :, :3])
    turned.info["exif"] = exif.tobytes()
    deep = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)
    return {"turned": turned, "alpha": Image.fromarray(noise), "palette": turned.quantize(16), "deep": deep}


@pytest.mark.parametrize("name", ["turned", "alpha", "palette", "deep"])
def test_openais_pixels_where_they_are_wanted(goldens, tmp_path, name):
    """Resized as stored, cropped, and made RGB last: what clip/clip.py does, one call after the other."""
    image = images_of_unusual_modes()[name]
    image.save(tmp_path / "image.png", exif=image.info.get("exif", b""))
    model, theirs = (
        clip_jax.load(goldens["openai_vit/archive"].path, preprocessing=choice) for choice in ("clip_jax", "openai")
    )
    stored = Image.open(tmp_path / "image.png").resize((36, 24), Image.Resampling.BICUBIC).crop((6, 0, 30, 24))
    expected = model.encode_image(np.asarray(stored.convert("RGB")))
    np.testing.assert_array_equal(theirs.encode_image(tmp_path / "image.png"), expected)
    np.testing.assert_array_equal(theirs.encode_image(Image.open(tmp_path / "image.png")), expected)
    assert np.abs(model.encode_image(tmp_path / "image.png") - expected).max() > 1e-3
    with pytest.raises(ValueError, match="preprocessing='pil' must be one of clip_jax, openai"):
        clip_jax.load(goldens["openai_vit/archive"].path, preprocessing="pil")
