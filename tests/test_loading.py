"""A model as an object: what it takes, what it refuses in a line, and how often it compiles."""

import dataclasses
import functools
import logging
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.data.tokenizer import tokenize
from clip_jax.loading import LoadedModel
from clip_jax.models.clip import CLIP, example_inputs
from clip_jax.models.presets import PRESETS, CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import Weights

PRESET = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2),
    TextTransformerPreset(width=16, num_layers=1, num_heads=2, context_length=20),
)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@functools.cache
def random_variables(preset):
    inputs = (jnp.zeros(array.shape, array.dtype) for array in example_inputs(preset))
    variables = nn.meta.unbox(jax.jit(CLIP(preset).init)(jax.random.key(0), *inputs))
    return {"batch_stats": {}} | jax.tree.map(np.asarray, variables)


def random_model(preset=PRESET, dtype="float32"):
    return LoadedModel(Weights(preset, random_variables(preset), "a test"), 64, dtype)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


class Tensor:
    """What a tensor of PyTorch is to us: its dtype's name has a prefix, and it may have to be detached and moved."""

    def __init__(self, array):
        self._array, self.shape, self.ndim = array, array.shape, array.ndim
        self.dtype = type("dtype", (), {"__str__": lambda _: f"torch.{array.dtype}"})()
        self._ready = False

    def detach(self):
        return self

    def cpu(self):
        self._ready = True
        return self

    def __array__(self, dtype=None, copy=None):
        assert self._ready
        return self._array

    def __iter__(self):
        return map(Tensor, self._array)


def test_a_model_says_what_it_is(model):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model._variables["params"]))
    assert repr(model) == (
        f"<clip_jax model custom (Vision Transformer with patches of 8): {parameters:,} "
        "parameters, images 16 x 16, texts of 20 tokens, embeddings of 16, float32, from a test>"
    )
    assert "\n" not in repr(model)


def test_the_package_lists_what_it_has():
    assert {"load", "tokenize", "LoadedModel", "CLIP", "PRESETS", "__version__"} <= set(dir(clip_jax))
    assert all(hasattr(clip_jax, name) for name in clip_jax.__all__)
    assert (pathlib.Path(clip_jax.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "images",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: bytes(path),
        lambda path: np.array([str(path)]),
        lambda path: np.str_(path),
        lambda path: (path for path in [path]),
        lambda path: Image.open(path),
        lambda path: PIXELS,
        lambda path: PIXELS[None],
        lambda path: [PIXELS[:, ::-1][:, ::-1]],  # not contiguous
        lambda path: jnp.asarray(PIXELS),
        lambda path: Tensor(PIXELS),
        lambda path: Tensor(PIXELS[None]),
        lambda path: [Tensor(PIXELS)],
        lambda path: np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
    ],
)
def test_an_image_is_the_same_however_it_is_given(model, photo, images):
    expected = model.encode_image([PIXELS])
    np.testing.assert_array_equal(model.encode_image(images(photo)), expected)


def test_gray_is_two_or_three_axes_and_sixteen_bits_come_from_files(model, tmp_path):
    gray = PIXELS[:, :, 0]
    expected = model.encode_image(np.dstack([gray] * 3))
    np.testing.assert_array_equal(model.encode_image([gray]), expected)
    np.testing.assert_array_equal(model.encode_image([gray[:, :, None]]), expected)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(model.encode_image(tmp_path / "deep.png"), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (PIXELS / np.float32(255), ["float32 [20, 30, 3]", "multiply pixels in [0, 1] by 255", "mean and standard"]),
        (Tensor(np.moveaxis(PIXELS, 2, 0) / np.float32(255)), ["float32 [3, 20, 30]", "channels last", "by 255"]),
        (np.moveaxis(PIXELS, 2, 0), ["uint8 [3, 20, 30]", "channels last"]),
        (PIXELS.astype(np.uint16), ["uint16", "divide it by 257"]),
        (PIXELS.astype(np.int64), ["int64", "convert pixels in [0, 255] to uint8"]),
        (jnp.asarray(PIXELS, jnp.bfloat16), ["bfloat16", "by 255"]),
        (PIXELS[:0], ["uint8 [0, 30, 3]"]),
        (np.zeros((1, 2, 3, 4, 3), np.uint8), ["uint8 [1, 2, 3, 4, 3]"]),
        (np.zeros((300, 2), np.uint8), ["300 pixels", "over 100 times"]),
        (b"\x89PNG\0\0", ["bytes are read as a path", "BytesIO"]),
        ("/", ["/: a folder, not an image file"]),
        ("/dev/null", ["/dev/null: a pipe or device"]),
    ],
)
def test_what_is_no_image_is_refused_in_a_line_with_the_fix(model, image, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are what is checked
        model.encode_image([image])
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("images", [None, 5, {"pixel_values": PIXELS}, [None], [[0, 1]], object()])
def test_what_could_not_be_an_image_is_a_type_error(model, images):
    with pytest.raises(TypeError, match=r"not (NoneType|int|dict|list|object)"):
        model.encode_image(images)


def test_nothing_gives_no_rows(model):
    for embeddings in (
        model.encode_image([]),
        model.encode_image(np.zeros((0, 8, 8, 3), np.uint8)),
        model.encode_text([]),
        model.encode_text(iter(())),
        model.encode_text(np.zeros((0, 77), np.int32)),
    ):
        assert embeddings.shape == (0, 16) and embeddings.dtype == np.float32
    assert model.classify([], (label for label in "ab")).shape == (0, 2)
    assert model.tokenize([]).shape == (0, 20)


TEXTS = ["a cat", "a dog", "two words more than that"]


@pytest.mark.parametrize(
    "texts",
    [
        lambda model: iter(TEXTS),
        lambda model: np.array(TEXTS),
        lambda model: model.tokenize(TEXTS),
        lambda model: tokenize(TEXTS),  # 77 columns, of which the model has 20
        lambda model: np.where(tokenize(TEXTS) == 0, 49_407, tokenize(TEXTS)),  # Hugging Face's padding
        lambda model: tokenize(TEXTS, 9),
        lambda model: Tensor(tokenize(TEXTS).astype(np.int64)),
        lambda model: jnp.asarray(tokenize(TEXTS)),
        lambda model: tokenize(TEXTS).astype(np.uint16),
    ],
)
def test_a_text_is_the_same_however_it_is_given(model, texts):
    np.testing.assert_array_equal(model.encode_text(texts(model)), model.encode_text(TEXTS))


def test_tokens_that_do_not_fit_are_refused_by_row_and_model_tokenize_cuts_them(model):
    texts = ["short", "far too many words " * 9]
    with pytest.raises(ValueError, match=r"row 1 of 77 does not end before that; make them with model\.tokenize"):
        model.encode_text(tokenize(texts))
    tokens = model.tokenize(texts)
    assert tokens.shape == (2, 20) and tokens.dtype == np.int32
    np.testing.assert_array_equal(model.encode_text(tokens), model.encode_text(texts))
    np.testing.assert_array_equal(model.tokenize("short"), tokens[:1])


@pytest.mark.parametrize("texts", [None, 5, b"bytes", [b"bytes"], {"input_ids": [1]}, [[1, 2]], [1.5]])
def test_what_is_no_text_is_a_type_error(model, texts):
    with pytest.raises(TypeError, match="text"):
        model.encode_text(texts)


@pytest.mark.parametrize(
    "tokens", [np.zeros((1, 5)), np.zeros((1, 0), int), np.full((1, 5), -1), np.zeros((1, 1, 5), int)]
)
def test_what_are_no_tokens_is_a_line(model, tokens):
    with pytest.raises(ValueError, match="tokens must"):
        model.encode_text(tokens)


@pytest.mark.parametrize(
    ("labels", "templates", "error", "words"),
    [
        ([], ["{}"], ValueError, "at least one label"),
        (["a"], [], ValueError, "one template"),
        (["a", "b", "a"], ["{}"], ValueError, r"labels\[2\] repeats 'a'"),
        (["a", " "], ["{}"], ValueError, r"labels\[1\] is empty"),
        (["a", 5], ["{}"], TypeError, r"labels\[1\] is int, not str"),
        (["a"], ["{}", None], TypeError, r"templates\[1\] is NoneType"),
        (["a"], ["{}", "a photo"], ValueError, "'a photo' has no {}"),
    ],
)
def test_labels_and_templates_that_make_no_sense_are_refused(model, labels, templates, error, words):
    with pytest.raises(error, match=words):
        model.classify([PIXELS], labels, templates)


def test_each_image_is_answered_or_explained_in_order(model, photo):
    images = [photo, "none.png", PIXELS, None, photo]
    answers = list(model.classify_each(images, ["a", "b"]))
    expected = model.classify(PIXELS, ["a", "b"])[0]
    for index in (0, 2, 4):
        np.testing.assert_allclose(answers[index], expected, rtol=1e-5)
    assert isinstance(answers[1], FileNotFoundError) and isinstance(answers[3], TypeError)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        model.classify(images, ["a", "b"])


def test_images_are_asked_for_no_more_than_two_batches_ahead(model, monkeypatch):
    asked = []

    def make_images():
        for number in range(100):
            asked.append(number)
            yield PIXELS

    monkeypatch.setattr(model, "_batch_size", 8)
    answers = model.classify_each(make_images(), ["a", "b"])
    for number, _ in enumerate(answers):
        assert len(asked) <= number + 2 * 8 + 1
    assert len(asked) == 100


def test_one_image_twice_is_read_once_at_a_time(model, photo):
    image = Image.open(photo)  # not read yet
    embeddings = model.encode_image([image] * 9)
    np.testing.assert_array_equal(embeddings, np.repeat(embeddings[:1], 9, axis=0))


def test_a_damaged_image_that_is_open_is_named(model, tmp_path, photo):
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png"):
        model.encode_image(Image.open(tmp_path / "cut.png"))


def test_weights_that_are_not_finite_give_no_probabilities(model, monkeypatch):
    nothing = jax.tree.map(lambda leaf: leaf * np.nan, model._variables)
    monkeypatch.setattr(model.embedder, "_variables", nothing)
    for use in (
        lambda: model.classify(PIXELS, ["a", "b"]),
        lambda: model.encode_image(PIXELS),
        lambda: model.encode_text("a"),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            use()


def test_bfloat16_computes_in_it_and_returns_float32(model):
    half = random_model(dtype="bfloat16")
    embeddings = half.encode_image(PIXELS)
    assert embeddings.dtype == np.float32 and "bfloat16" in repr(half)
    np.testing.assert_allclose(embeddings, model.encode_image(PIXELS), rtol=0, atol=0.02)


def test_any_number_of_labels_and_images_compiles_a_few_programs(caplog):
    model = random_model()  # with batches of 64, on eight devices: 8 or 64 rows
    words = " ".join(["word"] * 30)
    caplog.set_level(logging.DEBUG, "jax")
    with jax.log_compiles():
        for count in (1, 2, 3, 5, 9, 17, 31, 40, 64, 65, 100):
            model.classify([PIXELS] * count, [f"{words[: 5 * (number % 14)]} {number}" for number in range(count)])
    compiled = [message for message in caplog.messages if message.startswith("Finished XLA compilation")]
    assert (
        len(compiled) <= 2 + 2 * 3 + 1
    )  # images; texts padded to 8, 16 and 20 tokens; more than a batch of them to 24


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_model_of_a_published_architecture_is_called_by_its_name(name):
    model = LoadedModel.__new__(LoadedModel)
    model.preset, model._variables, model._dtype, model._format = PRESETS[name], {"params": {}}, "float32", "OpenAI"
    assert repr(model).startswith(f"<clip_jax model {name}: 0 parameters, images ")


def test_a_model_whose_vocabulary_is_not_the_tokenizers_takes_tokens_alone():
    model = random_model(dataclasses.replace(PRESET, text=dataclasses.replace(PRESET.text, vocab_size=100)))
    for call in (model.encode_text, model.tokenize):
        with pytest.raises(ValueError, match="vocabulary of 100"):
            call(["a cat"])
    assert model.encode_text(np.array([[98, 5, 99]])).shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty", None),
        ("pipe.pt", b"pipe"),
        ("zero.pt", b""),
        ("text.pt", b"hello\n" * 99),
        ("photo.safetensors", b"\x89PNG\r\n" * 99),
    ],
)
def test_what_is_no_model_is_a_line(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content == b"pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name) as error:
        clip_jax.load(path)
    assert "\n" not in str(error.value)
