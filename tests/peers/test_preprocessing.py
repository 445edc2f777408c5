"""Every way of preparing images that open_clip's pretrained models have, and those of Hugging Face's CLIP."""

import copy
import itertools
import json

import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.data.images import evaluation_transform
from clip_jax.models.clip import normalize_images
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.weights import WeightsError
from clip_jax.weights import open_clip as open_clip_files
from clip_jax.weights.huggingface_fields import preprocessing_config, read_preprocessing

torch = pytest.importorskip("torch")
open_clip, transformers = (pytest.importorskip(name) for name in ("open_clip", "transformers"))

SHAPES = [(60, 41), (37, 90), (32, 32), (33, 32), (64, 63), (100, 20), (31, 33), (20, 15)]


def make_image(width, height):
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def prepared(image, size, preprocessing):
    """float32 ``[S, S, 3]``, as the tower sees it."""
    pixels = evaluation_transform(image, size, preprocessing)
    return np.asarray(normalize_images(pixels[None], preprocessing))[0]


def supported():
    """Configs of open_clip by their names, those whose towers are built here."""
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            yield name, config, open_clip_files.read_config({"model_cfg": copy.deepcopy(config)})
        except WeightsError:
            continue


def shrunk(config):
    """With the same kinds of parts, and few of them: two layers, two heads, images of two patches a side."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision["width"] = 2 * vision.get("head_width", 64)
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    else:
        vision |= {"layers": 2, "image_size": 2 * vision["patch_size"]}
    text |= {"layers": 1, "heads": 2, "width": 64}
    return config | {"embed_dim": 32}


def check_folder(config, preprocess, folder):
    """Random weights of this config, and the same embeddings by open_clip and by us."""
    torch.manual_seed(0)
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    arguments = {key: value for key, value in config.items() if key not in ("custom_text",)}
    torch.save(open_clip.CLIP(**arguments).state_dict(), folder / "open_clip_pytorch_model.bin")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ours = clip_jax.load(folder, preprocessing="openai")
    for image in (make_image(60, 41), make_image(37, 90).convert("RGBA")):
        with torch.inference_mode():
            expected = model.eval().encode_image(transform(image)[None], normalize=True).numpy()
        np.testing.assert_allclose(ours.encode_image(image), expected, rtol=0, atol=2e-5)
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"]), normalize=True)
    np.testing.assert_allclose(ours.encode_text("a cat"), expected.numpy(), rtol=0, atol=2e-5)


def test_each_config_that_is_supported_gives_open_clips_embeddings(tmp_path):
    configs = list(supported())
    assert (len(open_clip.list_models()), len(configs)) == (144, 41)
    unlike = {}  # once shrunk, many are the same
    for name, config, preset in configs:
        assert open_clip_files.read_config(open_clip_files.config_of(preset)) == preset, name
        unlike.setdefault(json.dumps(shrunk(config), sort_keys=True), name)
    for place, (config, name) in enumerate(unlike.items()):
        check_folder(json.loads(config), {}, tmp_path / f"{place}_{name}")


def test_each_preprocessing_of_the_pretrained_tags_gives_open_clips_embeddings(tmp_path):
    towers = {name: (config, preset) for name, config, preset in supported()}
    tags = [(name, tag) for name, tag in open_clip.list_pretrained() if name in towers]
    resnets = sum(isinstance(towers[name][1].vision, ResNetPreset) for name, _ in tags)
    assert (len(open_clip.list_pretrained()), len(tags) - resnets, resnets) == (196, 80, 16)
    keys = ("mean", "std", "interpolation", "resize_mode")
    unlike = {}
    for name, tag in tags:
        pretrained = open_clip.get_pretrained_cfg(name, tag)
        preprocess = {key: pretrained[key] for key in keys if key in pretrained}
        config = towers[name][0] | ({"quick_gelu": True} if pretrained.get("quick_gelu") else {})
        read = open_clip_files.read_config({"model_cfg": config, "preprocess_cfg": preprocess}).preprocessing
        assert read == Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items()}), tag
        unlike.setdefault((json.dumps(preprocess), isinstance(towers[name][1].vision, ResNetPreset)), config)
    assert len(unlike) == 4  # of Vision Transformers three, of ResNets one
    for place, ((preprocess, _), config) in enumerate(unlike.items()):
        check_folder(shrunk(config), json.loads(preprocess), tmp_path / str(place))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_open_clips(mode, interpolation):
    values = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resize_mode": mode, "interpolation": interpolation}
    for shape, fill_color in itertools.product(SHAPES, (0, 128)):
        theirs = open_clip.image_transform(32, is_train=False, fill_color=fill_color, **values)(make_image(*shape))
        ours = prepared(make_image(*shape), 32, Preprocessing(fill_color=fill_color, **values))
        np.testing.assert_allclose(ours, theirs.permute(1, 2, 0).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_openais_pixels_are_open_clips_for_every_mode(image_mode):
    for resize_mode in ("shortest", "longest", "squash"):
        way = Preprocessing(resize_mode=resize_mode, fill_color=50)
        for shape in SHAPES:
            image = make_image(*shape).convert(image_mode)
            theirs = open_clip.image_transform(32, is_train=False, resize_mode=resize_mode, fill_color=50)(image)
            np.testing.assert_allclose(prepared(image, 32, way), theirs.permute(1, 2, 0).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"size": {"shortest_edge": 36}},
        {"size": {"shortest_edge": 28}},
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": 40, "width": 40}, "resample": 2},
        {"resample": 0},
        {"resample": 1},
        {"resample": 4},
        {"resample": 5},
    ],
)
def test_pixels_are_those_of_hugging_faces_processor_with_pillow(changes):
    content = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | changes
    preprocessing = read_preprocessing("preprocessor_config.json", content, 32)
    written = preprocessing_config(preprocessing, 32)
    for shape in [
        (60, 40),
        (36, 90),
        (32, 32),
        (100, 20),
    ]:  # even margins: with odd ones its crop is a pixel beside ours
        ours = prepared(make_image(*shape), 32, preprocessing)
        for config in (content, written):
            processor = transformers.CLIPImageProcessorPil(**config)
            theirs = processor(make_image(*shape), return_tensors="np")["pixel_values"][0]
            np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), rtol=0, atol=2e-5)
