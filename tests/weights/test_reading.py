"""Weights that PyTorch's CLIPs have saved are recognised, and compute what they compute there."""

import dataclasses
import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest
from goldens import MODELS, assert_like_the_peer, compute, flat
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax.models.presets import PRESETS
from clip_jax.weights import WeightsError, read_weights, write_weights

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_recognised_and_embeds_like_the_peer_that_saved_it(goldens, name):
    weights = read_weights(goldens[name].path)
    assert weights.preset == MODELS[name].preset
    assert weights.format == MODELS[name].format
    expected = goldens[name].expected
    assert_like_the_peer(compute(weights, expected["images"], expected["tokens"]), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_of_the_peers_tell_images_texts_and_activations_apart(goldens, name):
    expected = goldens[name].expected
    for rows in (expected["image_embeddings"], expected["text_embeddings"]):
        first, second = np.triu_indices(len(rows), 1)
        assert np.abs(rows[first] - rows[second]).max(axis=1).min() > 1e-2
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    by_activation = [goldens[f"huggingface/{kind}"].expected["text_embeddings"] for kind in ("gelu", "quick_gelu")]
    assert np.abs(by_activation[0] - by_activation[1]).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "openai_vit/archive",
        "openai_resnet/float32",
        "open_clip_vit/gelu",
        "open_clip_resnet/checkpoint",
        "huggingface/gelu",
    ],
)
def test_a_loaded_model_embeds_arrays_of_its_size_and_tokens_like_the_peer(goldens, name):
    expected = goldens[name].expected
    model = clip_jax.load(goldens[name].path)
    actual = {
        "image_embeddings": model.encode_image(expected["images"]),
        "text_embeddings": model.encode_text(expected["tokens"]),
    }
    actual["logits"] = model.logit_scale * actual["image_embeddings"] @ actual["text_embeddings"].T
    assert model.preset == MODELS[name].preset
    assert_like_the_peer(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_keep_their_dtypes(goldens, name):
    variables = read_weights(goldens[name].path).variables
    dtypes = {path: array.dtype.name for path, array in flat(variables["params"]).items()}
    half = {path for path, dtype in dtypes.items() if dtype == "float16"}
    assert set(dtypes.values()) - {"float16"} == {"float32"}
    if name.endswith(("archive", "float16")):
        assert {"text.transformer.blocks.qkv.kernel", "text.projection.kernel"} <= half
        assert not {"logit_scale", "text.token_embedding", "text.ln_final.scale"} & half
    else:
        assert not half
    for path, array in flat(variables["batch_stats"]).items():
        assert array.dtype == ("int32" if path.endswith("num_batches") else "float32")
    assert bool(flat(variables["batch_stats"])) == ("resnet" in name)


def test_a_file_of_a_folder_is_read_with_the_config_beside_it(goldens):
    for name in ("open_clip_vit/gelu", "open_clip_resnet/checkpoint", "huggingface/gelu"):
        weights = read_weights(goldens[name].file)
        assert (weights.preset, weights.format) == (MODELS[name].preset, MODELS[name].format)
        assert weights.note == ""


def test_only_a_bare_file_that_openai_did_not_publish_leaves_its_activation_open(goldens):
    for name, model in MODELS.items():
        note = read_weights(goldens[name].path).note
        assert bool(note) == (name.startswith("openai") and not name.endswith("archive")), name
        assert not note or (model.file in note and "activation=gelu" in note and "\n" not in note)


def test_the_activation_of_a_bare_file_is_what_one_says(goldens):
    path, _, expected = goldens["openai_vit/float32"]
    default, gelu, quick_gelu = (read_weights(path, activation) for activation in (None, "gelu", "quick_gelu"))
    assert default.preset == quick_gelu.preset
    assert quick_gelu.note == gelu.note and "activation" not in gelu.note and "how images are prepared" in gelu.note
    assert (gelu.preset.vision.activation, gelu.preset.text.activation) == ("gelu", "gelu")
    other = compute(gelu, expected["images"], expected["tokens"])
    assert np.abs(other["text_embeddings"] - expected["text_embeddings"]).max() > 1e-3


@pytest.mark.parametrize("name", ["huggingface/gelu", "open_clip_vit/gelu"])
def test_an_activation_that_contradicts_the_config_is_refused(goldens, name):
    for path in (goldens[name].path, goldens[name].file):
        assert read_weights(path, "gelu").preset == MODELS[name].preset
        with pytest.raises(WeightsError, match=r"activation='quick_gelu' contradicts the model's config.* 'gelu'"):
            read_weights(path, "quick_gelu")


def test_loading_a_bare_file_warns_of_its_activation_once(goldens, caplog):
    logger = logging.getLogger("clip_jax")
    logger.addHandler(caplog.handler)
    try:
        clip_jax.load(goldens["openai_vit/float32"].path)
        clip_jax.load(goldens["openai_vit/float32"].path, activation="quick_gelu")
    finally:
        logger.removeHandler(caplog.handler)
    first, second = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert "float32.pt does not tell its activation" in first and "activation" not in second


def test_a_checkpoint_in_a_folder_of_its_own_is_read_as_a_bare_file(goldens, tmp_path):
    source = goldens["huggingface/quick_gelu"].file
    shutil.copy(source, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="heads"):  # 48 wide
        read_weights(tmp_path / "weights.safetensors")
    shutil.copy(goldens["openai_vit/float32"].path, tmp_path / "epoch_3.pt")
    assert read_weights(tmp_path / "epoch_3.pt").preset == MODELS["openai_vit/float32"].preset


def test_bare_weights_with_the_names_of_hugging_face_are_recognised(goldens, tmp_path):
    weights = read_weights(goldens["openai_vit/float32"].path)
    write_weights(weights, tmp_path / "folder", "huggingface")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "folder/model.safetensors", tmp_path / "bare/model.safetensors")
    bare = read_weights(tmp_path / "bare/model.safetensors")
    assert (bare.preset, bare.format) == (weights.preset, "Hugging Face")
    assert "activation=gelu" in bare.note


def test_our_single_file_carries_its_config(goldens, tmp_path):
    source = read_weights(goldens["open_clip_vit/gelu"].path)
    write_weights(source, tmp_path / "model.safetensors", "open_clip")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["open_clip_config.json"])["model_cfg"]["quick_gelu"] is False
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.preset == source.preset  # activation, heads and MLP, none of which the shapes tell
    assert weights.note == ""
    expected = goldens["open_clip_vit/gelu"].expected
    assert_like_the_peer(compute(weights, expected["images"], expected["tokens"]), expected)


@pytest.mark.parametrize("width", [1280, 1408, 1664, 1792])
def test_the_image_towers_of_open_clip_with_wide_heads_have_sixteen(goldens, width):
    from clip_jax.weights.mapping import preset_from_shapes
    from clip_jax.weights.openai import TABLE

    tensors = goldens["openai_vit/float32"].tensors()
    shapes = {
        "visual.conv1.weight": (width, 3, 14, 14),
        "visual.positional_embedding": (257, width),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (4 * width, width),
    }
    tensors |= {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert preset_from_shapes(tensors, TABLE, "gelu").vision.num_heads == 16


def test_an_old_config_of_hugging_face_with_parts_given_twice_is_read_as_transformers_reads_it():
    from clip_jax.weights import huggingface

    def activation_of(**parts):
        return huggingface.read_config({"model_type": "clip"} | parts).text.activation

    assert activation_of(text_config={"hidden_act": "gelu"}) == "gelu"
    assert activation_of(text_config_dict={"hidden_act": "gelu"}) == "gelu"
    # There "..._config_dict" wins, and with its defaults where it is silent.
    assert activation_of(text_config={"hidden_act": "quick_gelu"}, text_config_dict={"hidden_act": "gelu"}) == "gelu"
    assert activation_of(text_config={"hidden_act": "gelu"}, text_config_dict={"hidden_size": 512}) == "quick_gelu"


def test_configs_that_leave_out_defaults_are_those_of_the_published_models():
    from clip_jax.weights import huggingface, open_clip

    b32 = PRESETS["ViT-B/32"]
    assert huggingface.read_config({"model_type": "clip"}) == b32
    old = {"text_config": {"eos_token_id": 2}, "vision_config": None, "text_config_dict": None}
    assert huggingface.read_config({"model_type": "clip", **old}) == b32
    b16 = {"embed_dim": 512, "quick_gelu": True, "vision_cfg": {"pool_type": "tok"}, "text_cfg": {"proj_bias": False}}
    assert open_clip.read_config(b16) == PRESETS["ViT-B/16"]
    resnet = {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}
    assert open_clip.read_config(resnet) == PRESETS["RN50"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_written_for_each_published_model_reads_back_as_it(name):
    from clip_jax.weights import huggingface, open_clip

    for activation in ("quick_gelu", "gelu"):
        preset = PRESETS[name]
        text = dataclasses.replace(preset.text, activation=activation)
        vision = preset.vision
        if not hasattr(vision, "stage_sizes"):
            vision = dataclasses.replace(vision, activation=activation)
        preset = dataclasses.replace(preset, vision=vision, text=text)
        assert open_clip.read_config(json.loads(json.dumps(open_clip.config_of(preset)))) == preset
        if not hasattr(vision, "stage_sizes"):
            assert huggingface.read_config(json.loads(json.dumps(huggingface.config_of(preset)))) == preset


def test_a_resnet_without_counters_of_batches_is_read(goldens, tmp_path):
    file = goldens["open_clip_resnet/checkpoint"]
    shutil.copytree(file.path, tmp_path / "old")
    (tmp_path / "old/open_clip_pytorch_model.bin").unlink()
    tensors = {name: array for name, array in file.tensors().items() if "num_batches_tracked" not in name}
    save_file(tensors, tmp_path / "old/open_clip_model.safetensors")
    weights = read_weights(tmp_path / "old")
    assert compute(weights, file.expected["images"], file.expected["tokens"])["logits"] == pytest.approx(
        file.expected["logits"], abs=1e-4
    )


def test_position_ids_of_old_files_are_passed_over(goldens, tmp_path):
    golden = goldens["huggingface/gelu"]
    shutil.copytree(golden.path, tmp_path / "old")
    ids = {f"{tower}_model.embeddings.position_ids": np.arange(8)[None] for tower in ("text", "vision")}
    save_file(load_file(golden.file) | ids, tmp_path / "old/model.safetensors")
    assert read_weights(tmp_path / "old").preset == MODELS["huggingface/gelu"].preset


def sharded(golden, folder, name="model.safetensors", shards=2):
    """Copies a golden folder of Hugging Face with its tensors in shards, and returns the index."""
    shutil.copytree(golden.path, folder)
    tensors = load_file(golden.file)
    (folder / golden.file.name).unlink()
    index = {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / f"{name}.index.json"


def test_shards_are_read_by_their_index(goldens, tmp_path):
    golden = goldens["huggingface/gelu"]
    index = sharded(golden, tmp_path / "model")
    whole = flat(read_weights(golden.path).variables)
    for path in (index, index.parent):
        weights = read_weights(path)
        assert weights.preset == MODELS["huggingface/gelu"].preset
        assert all(np.array_equal(leaf, whole[name]) for name, leaf in flat(weights.variables).items())


def test_damaged_shards_are_refused_by_name(goldens, tmp_path):
    index = sharded(goldens["huggingface/gelu"], tmp_path / "model")
    first, second = sorted(index.parent.glob("model-*"))
    third = shutil.copy(first, index.parent / "model-00003-of-00003.safetensors")
    with pytest.raises(WeightsError, match=third.name):
        read_weights(index)
    third.unlink()
    second.unlink()
    with pytest.raises(WeightsError, match=second.name):
        read_weights(index)
    shutil.copy(first, second)
    with pytest.raises(WeightsError, match="differ in"):
        read_weights(index.parent)
    for content, words in (("{}", "weight_map"), ('{"weight_map": {"a": "../a.safetensors"}}', "'../a.safetensors'")):
        index.write_text(content)
        with pytest.raises(WeightsError, match=words):
            read_weights(index)


def test_one_shard_alone_is_refused(goldens, tmp_path):
    sharded(goldens["huggingface/gelu"], tmp_path / "model")
    with pytest.raises(WeightsError, match="one shard of several"):
        read_weights(tmp_path / "model/model-00001-of-00002.safetensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "clip.", "module._orig_mod.", "model.clip."])
@pytest.mark.parametrize("name", ["huggingface/gelu", "open_clip_vit/gelu"])
def test_the_prefixes_of_wrappers_are_removed(goldens, tmp_path, name, prefix):
    golden = goldens[name]
    shutil.copytree(golden.path, tmp_path / "model")
    tensors = {prefix + key: tensor for key, tensor in load_file(golden.file).items()}
    save_file(tensors, tmp_path / "model" / golden.file.name)
    found = flat(read_weights(tmp_path / "model").variables)
    assert all(np.array_equal(leaf, found[key]) for key, leaf in flat(read_weights(golden.path).variables).items())


def test_a_variant_is_read_with_the_config_in_its_folder(goldens, tmp_path):
    golden = goldens["huggingface/gelu"]
    shutil.copytree(golden.path, tmp_path / "model")
    golden_file = tmp_path / "model" / golden.file.name
    variant = golden_file.rename(tmp_path / "model/model.fp16.safetensors")
    for path in (variant, variant.parent):
        assert read_weights(path).preset == MODELS["huggingface/gelu"].preset
    shutil.copy(variant, tmp_path / "model/model.fp32.safetensors")
    with pytest.raises(WeightsError, match=r"name one: model.fp16.safetensors, model.fp32.safetensors"):
        read_weights(tmp_path / "model")


def test_sizes_may_be_given_for_both_sides(goldens, tmp_path):
    for name, part, file in (
        ("huggingface/gelu", ("vision_config",), "config.json"),
        ("open_clip_vit/gelu", ("model_cfg", "vision_cfg"), "open_clip_config.json"),
    ):
        folder = tmp_path / name
        shutil.copytree(goldens[name].path, folder)
        config = json.loads((folder / file).read_text())
        vision = config
        for key in part:
            vision = vision[key]
        vision.update({key: [vision[key]] * 2 for key in ("image_size", "patch_size")})
        (folder / file).write_text(json.dumps(config))
        assert read_weights(folder).preset == MODELS[name].preset
        vision["image_size"][0] += 1
        (folder / file).write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=r"image_size=.* is not square"):
            read_weights(folder)


def test_float8_is_refused_by_its_name(tmp_path):
    save_file({"a": np.zeros(2, ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"F8_E4M3.*save the model in float32"):
        read_weights(tmp_path / "model.safetensors")
