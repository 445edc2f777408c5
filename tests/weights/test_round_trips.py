"""Weights go through every format and come back with the same names, dtypes and bytes."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from goldens import MODELS, assert_same_tensors, flat
from safetensors.numpy import load_file, save_file

from clip_jax.weights import Weights, read_weights, write_weights
from clip_jax.weights.mapping import WeightsError
from clip_jax.weights.torch_file import read_torch_file

OWN_FORMATS = {"OpenAI": "openai", "open_clip": "open_clip", "Hugging Face": "huggingface"}
SIZES = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives beside the weights


def write(weights, folder, format):  # noqa: A002
    """Writes the weights into a folder and returns what a person would name."""
    path = folder / f"to_{format}{'.pt' if format == 'openai' else ''}"
    write_weights(weights, path, format)
    return path


def tensors_in(path):
    """What is in the file, or in the one file of weights of the folder."""
    if path.is_dir():
        [path] = path.glob("*.safetensors")
    return read_torch_file(path) if path.suffix == ".pt" else load_file(path)


def own_tensors(golden):
    return {name: tensor for name, tensor in golden.tensors().items() if name not in SIZES}


def assert_same_weights(actual, expected):
    assert actual.preset == expected.preset
    assert_same_tensors(flat(actual.variables), flat(expected.variables))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_written_in_its_own_format_has_every_tensor_of_the_peers_file(goldens, tmp_path, name):
    weights = read_weights(goldens[name].path)
    path = write(weights, tmp_path, OWN_FORMATS[weights.format])
    assert_same_tensors(tensors_in(path), own_tensors(goldens[name]))
    assert_same_weights(read_weights(path, "quick_gelu" if path.suffix == ".pt" else None), weights)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_ours_keeps_every_bit(goldens, tmp_path, name):
    source = read_weights(goldens[name].path)
    ours = read_weights(write(source, tmp_path, "clip_jax"))
    assert ours.format == "clip_jax"
    assert_same_weights(ours, source)
    back = write(ours, tmp_path, OWN_FORMATS[source.format])
    assert_same_tensors(tensors_in(back), own_tensors(goldens[name]))


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("openai_vit/archive", ("huggingface", "open_clip", "clip_jax", "openai")),
        ("openai_vit/float32", ("open_clip", "huggingface", "clip_jax", "openai")),
        ("openai_resnet/archive", ("open_clip", "clip_jax", "openai")),
        ("huggingface/gelu", ("open_clip", "clip_jax", "huggingface")),
        ("open_clip_vit/gelu", ("clip_jax", "huggingface", "open_clip")),
    ],
)
def test_a_model_comes_back_from_a_journey_through_the_formats_as_it_left(goldens, tmp_path, name, formats):
    source = weights = read_weights(goldens[name].path)
    for format in formats:  # noqa: A001
        path = write(weights, tmp_path, format)
        weights = read_weights(path)
        assert_same_weights(weights, source)
    assert_same_tensors(tensors_in(path), own_tensors(goldens[name]))


@pytest.mark.parametrize("name", ["openai_resnet/float16", "open_clip_resnet/checkpoint", "openai_vit/archive"])
def test_a_single_file_for_open_clip_has_the_same_tensors(goldens, tmp_path, name):
    weights = read_weights(goldens[name].path)
    write_weights(weights, tmp_path / "model.safetensors", "open_clip")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), own_tensors(goldens[name]))
    assert_same_weights(read_weights(tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize("format", ["openai", "open_clip", "huggingface", "clip_jax"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_every_format_keeps_a_dtype_that_the_whole_model_has(goldens, tmp_path, format, dtype):  # noqa: A002
    source = {name: array.astype(dtype) for name, array in goldens["openai_vit/float32"].tensors().items()}
    save_file(source, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path / "model.safetensors", "quick_gelu")
    assert {array.dtype for array in flat(weights.variables).values()} == {np.dtype(dtype)}
    path = write(weights, tmp_path, format)
    assert_same_weights(read_weights(path, "quick_gelu"), weights)
    if format == "huggingface":
        config = json.loads((path / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == np.dtype(dtype).name


def test_bfloat16_is_read_bit_for_bit(goldens, tmp_path):
    tensors = goldens["openai_vit/float32"].tensors()
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path / "model.safetensors", "quick_gelu")
    write_weights(weights, tmp_path / "again.safetensors", "open_clip")
    views = dict(safetensors.deserialize((tmp_path / "again.safetensors").read_bytes()))
    assert sorted(views) == sorted(tensors)
    for name, array in tensors.items():
        assert (views[name]["dtype"], tuple(views[name]["shape"])) == ("BF16", array.shape)
        assert bytes(views[name]["data"]) == array.tobytes()


def test_the_config_for_hugging_face_says_what_the_peers_own_says(goldens, tmp_path):
    for name in ("huggingface/quick_gelu", "huggingface/gelu"):
        golden = goldens[name]
        written = write(read_weights(golden.path), tmp_path / name, "huggingface")
        ours, theirs = (json.loads((path / "config.json").read_text()) for path in (written, golden.path))
        for part in ("text_config", "vision_config"):
            given, wanted = ours.pop(part), theirs.pop(part)
            assert {key: wanted.get(key, value) for key, value in given.items()} == given
            assert wanted.keys() & given.keys() >= {"hidden_size", "intermediate_size", "hidden_act"}
        assert ours.pop("logit_scale_init_value") == pytest.approx(theirs.pop("logit_scale_init_value"), abs=1e-3)
        assert {key: theirs.get(key, value) for key, value in ours.items()} == ours
        ours, theirs = (json.loads((path / "preprocessor_config.json").read_text()) for path in (written, golden.path))
        assert {key: theirs[key] for key in ours} == ours | {"image_processor_type": theirs["image_processor_type"]}


def test_a_folder_for_hugging_face_has_the_tokenizer(goldens, tmp_path):
    path = write(read_weights(goldens["huggingface/gelu"].path), tmp_path, "huggingface")
    vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    merges = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(vocabulary.values()) == list(range(49_408))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49_406, 49_407)
    assert merges[0].startswith("#version")
    assert len(merges) == 1 + 49_408 - 512 - 2
    assert all("".join(merge.split(" ")) in vocabulary for merge in merges[1:])
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    assert (tokenizer["tokenizer_class"], tokenizer["model_max_length"]) == ("CLIPTokenizer", 8)


def test_the_same_weights_are_the_same_bytes(goldens, tmp_path):
    weights = read_weights(goldens["openai_vit/archive"].path)
    for format in ("openai", "open_clip", "huggingface"):  # noqa: A001
        first, second = (write(weights, tmp_path / name, format) for name in ("first", "second"))
        files = [path for path in (first, *first.rglob("*")) if path.is_file()]
        assert files
        for file in files:
            other = second / file.relative_to(first) if second.is_dir() else second
            assert file.read_bytes() == other.read_bytes(), file.name


def test_writing_leaves_the_arrays_that_were_given_alone(goldens, tmp_path):
    weights = read_weights(goldens["openai_vit/float16"].path)
    before = {path: array.copy() for path, array in flat(weights.variables).items()}
    for format in ("openai", "open_clip", "huggingface", "clip_jax"):  # noqa: A001
        write(weights, tmp_path, format)
    assert_same_tensors(flat(weights.variables), before)


def test_arrays_of_jax_are_written_as_well(goldens, tmp_path):
    import jax
    import jax.numpy as jnp

    source = read_weights(goldens["openai_vit/float32"].path)
    weights = Weights(source.preset, jax.tree.map(jnp.asarray, source.variables), "memory")
    for format in ("openai", "open_clip", "huggingface", "clip_jax"):  # noqa: A001
        assert_same_weights(read_weights(write(weights, tmp_path, format), "quick_gelu"), source)


def test_the_bias_of_a_sigmoid_loss_goes_where_there_is_a_place_for_it(goldens, tmp_path):
    source = read_weights(goldens[next(iter(MODELS))].path)
    params = source.variables["params"] | {"logit_bias": np.float32(-9.5)}
    biased = source._replace(variables=source.variables | {"params": params})
    folder = write(biased, tmp_path, "open_clip")
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["init_logit_bias"] == -10
    assert tensors_in(folder)["logit_bias"] == np.float32(-9.5)
    assert_same_weights(read_weights(folder), biased)
    save_file(tensors_in(folder), tmp_path / "bare.safetensors")
    assert_same_weights(read_weights(tmp_path / "bare.safetensors", biased.preset.text.activation), biased)
    write_weights(biased, tmp_path / "ours", "clip_jax")
    assert_same_weights(read_weights(tmp_path / "ours"), biased)
    for name, path in (("huggingface", tmp_path / "refused"), ("openai", tmp_path / "refused.pt")):
        with pytest.raises(WeightsError, match="no place for the loss's logit_bias; clip_jax has"):
            write_weights(biased, path, name)
        assert not path.exists()
