"""Every mistake is one line that names what is wrong; nothing runs, and nothing half-written is left."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

import clip_jax
from clip_jax.convert import main
from clip_jax.weights import WeightsError, read_weights, write_weights

HUGGING_FACE, OPEN_CLIP = "huggingface/gelu", "open_clip_vit/gelu"


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that converts, and returns the one line by which that is refused."""

    def convert(source, *arguments: str, destination: str = "converted", code: int = 2) -> str:
        target = tmp_path / "target" / destination
        target.parent.mkdir(exist_ok=True)
        there = target.exists()
        assert main([str(source), str(target), *arguments]) == code
        output, errors = capsys.readouterr()
        assert output == ""
        [line] = [line for line in errors.splitlines() if not line.startswith("note: ")]
        assert line.startswith("error: " if code == 2 else "failed: ")
        if not there:
            assert list(target.parent.iterdir()) == []
        return line

    return convert


@pytest.fixture
def changed(goldens, tmp_path):
    """A function that copies a golden folder and changes what is in one of its JSON files."""

    def copy(name: str, file: str, change) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(goldens[name].path, folder)
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        return folder

    return copy


def test_nothing_there(refused, tmp_path):
    assert "none.pt: there is no such file or folder" in refused(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        clip_jax.load(tmp_path / "none.pt")


def test_a_folder_without_a_model_says_what_would_be_one(refused, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    line = refused(folder)
    for expected in (str(folder), "holds no model", "checkpoints/", "open_clip_config.json", "config.json"):
        assert expected in line
    with pytest.raises(FileNotFoundError, match="holds no model"):
        read_weights(folder)


def test_a_config_without_weights(refused, goldens, tmp_path):
    for name, file in (
        (HUGGING_FACE, "model.safetensors"),
        (OPEN_CLIP, "open_clip_model.safetensors"),
    ):
        folder = tmp_path / file
        shutil.copytree(goldens[name].path, folder)
        (folder / file).unlink()
        line = refused(folder)
        assert "but no weights" in line and file in line


@pytest.mark.parametrize("name", ["openai_vit/archive", "openai_resnet/float16", OPEN_CLIP])
@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_file_that_was_cut_short(refused, goldens, tmp_path, name, kept):
    source = goldens[name].file
    file = tmp_path / source.name
    file.write_bytes(source.read_bytes()[:kept])
    line = refused(file)
    assert str(file) in line
    assert "again" in line  # copy or download it again
    with pytest.raises(WeightsError):
        read_weights(file)


class Call:
    """Pickles as a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(refused, tmp_path, suffix):
    trace = tmp_path / "it ran"
    program = pickle.dumps({"state_dict": Call(f"touch '{trace}'")}, protocol=2)
    archive, bare = tmp_path / f"model{suffix}", tmp_path / f"bare{suffix}"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
    bare.write_bytes(program)
    line = refused(archive)
    assert "refused" in line and "system" in line and str(archive) in line
    assert "pickle" in refused(bare)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(model_type="siglip"), ["'siglip'", "'clip'"]),
        (lambda c: c.pop("model_type"), ["config.json", "'clip'"]),
        (lambda c: c["text_config"].update(hidden_act="relu"), ["text_config.hidden_act", "'relu'", "quick_gelu"]),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-6), ["vision_config.layer_norm_eps", "1e-06"]),
        (lambda c: c["text_config"].update(eos_token_id=7), ["eos_token_id=7"]),
        (lambda c: c["vision_config"].update(num_channels=1), ["num_channels=1"]),
        (
            lambda c: c["text_config"].update(hidden_size=64),
            ["of another shape", "text_model.embeddings.token_embedding.weight 64x32", "more"],
        ),
        (lambda c: c.update(projection_dim=16), ["visual_projection.weight 32x48", "text_projection.weight 32x32"]),
        (lambda c: c["vision_config"].update(num_hidden_layers=3), ["missing: vision_model.encoder.layers.2."]),
        (lambda c: c["text_config"].update(num_hidden_layers=1), ["not part", "text_model.encoder.layers.1.", "more"]),
        (
            lambda c: c["vision_config"].update(image_size=32),
            ["preprocessor_config.json", "crop_size", "the model's 32"],
        ),
        (lambda c: c["vision_config"].update(num_attention_heads=5), ["num_attention_heads=5 does not divide"]),
        (lambda c: c["vision_config"].update(num_attention_heads=0), ["num_attention_heads=0 is not a positive"]),
        (lambda c: c["text_config"].update(num_hidden_layers=2.0), ["num_hidden_layers=2.0 is not a positive"]),
        (lambda c: c.update(text_config=[1]), ["text_config=[1] is not a mapping"]),
        (lambda c: c["vision_config"].update(use_window=True), ["vision_config", "use_window=True", "not known"]),
        (lambda c: c["text_config"].update(rope_theta=1e4), ["text_config", "rope_theta=10000.0"]),
        (lambda c: c["text_config"].update(scale=0.0), ["text_config", "scale=0.0"]),
        (lambda c: c.update(quantization_config={"bits": 4}), ["quantization_config"]),
    ],
)
def test_a_config_of_hugging_face_for_something_else(refused, changed, change, words):
    line = refused(changed(HUGGING_FACE, "config.json", change))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "proj_type", None),
        ("vision_cfg", "timm_model_name", "convnext_base"),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "ls_init_value", 1e-4),
        (None, "multimodal_cfg", {"width": 512}),
    ],
)
def test_a_config_of_open_clip_with_what_is_not_built_here_names_the_key(refused, changed, part, key, value):
    def change(config):
        (config["model_cfg"][part] if part else config["model_cfg"])[key] = value

    line = refused(changed(OPEN_CLIP, "open_clip_config.json", change))
    assert "not support" in line
    assert f"{part}.{key}={value!r}" in line if part else f"{key}={value!r}" in line


@pytest.mark.parametrize("name", [OPEN_CLIP, HUGGING_FACE])
@pytest.mark.parametrize("text", ["", "{half", "[1, 2]", "\x00\x01"])
def test_a_config_that_is_none(refused, goldens, tmp_path, name, text):
    folder = tmp_path / "model"
    shutil.copytree(goldens[name].path, folder)
    [file] = [folder / name for name in ("config.json", "open_clip_config.json") if (folder / name).exists()]
    file.write_text(text)
    line = refused(folder)
    assert str(file) in line
    assert "is not JSON" in line or "is not a config" in line


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (HUGGING_FACE, lambda c: c["text_config"].update(hidden_size=None)),
        (HUGGING_FACE, lambda c: c["text_config"].update(hidden_size=0)),
        (HUGGING_FACE, lambda c: c["text_config"].update(num_attention_heads=0)),
        (HUGGING_FACE, lambda c: c["text_config"].update(num_attention_heads=5)),
        (HUGGING_FACE, lambda c: c["text_config"].update(vocab_size="64")),
        (HUGGING_FACE, lambda c: c.update(vision_config="small")),
        (HUGGING_FACE, lambda c: c["vision_config"].update(patch_size=7)),
        (OPEN_CLIP, lambda c: c.update(model_cfg="ViT-B-32")),
        (OPEN_CLIP, lambda c: c["model_cfg"].pop("embed_dim")),
        (OPEN_CLIP, lambda c: c["model_cfg"].update(vision_cfg=None)),
        (OPEN_CLIP, lambda c: c["model_cfg"]["vision_cfg"].update(width=None)),
        (OPEN_CLIP, lambda c: c["model_cfg"]["vision_cfg"].update(head_width=0)),
        (OPEN_CLIP, lambda c: c["model_cfg"]["vision_cfg"].update(image_size=[32, 48])),
        ("open_clip_resnet/checkpoint", lambda c: c["model_cfg"]["vision_cfg"].update(layers=[1, 2, 1])),
    ],
)
def test_a_config_whose_values_make_no_sense_is_refused_by_its_folder(refused, changed, name, change):
    file = "config.json" if name == HUGGING_FACE else "open_clip_config.json"
    assert str(changed(name, file, change)) in refused(changed(name, file, change))


def test_a_config_of_open_clip_may_leave_the_preprocessing_open(changed):
    assert read_weights(changed(OPEN_CLIP, "open_clip_config.json", lambda c: c.update(preprocess_cfg=None)))


def test_the_config_inside_of_a_file_is_damaged(refused, goldens, tmp_path):
    for text in ("{half", "[]"):
        file = tmp_path / "model.safetensors"
        save_file(goldens[OPEN_CLIP].tensors(), file, metadata={"open_clip_config.json": text})
        assert str(file) in refused(file)


def openai_file(goldens, tmp_path, name="openai_vit/float32", **changes):
    """A golden model with some tensors replaced; None takes one away."""
    file = tmp_path / "model.safetensors"
    tensors = goldens[name].tensors() | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: np.asarray(value, np.float32) for key, value in tensors.items() if value is not None}, file)
    return file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_scale": None}, ["missing: logit_scale"]),
        ({"text_projection": None}, ["text_projection"]),
        ({"visual__ln_pre__bias": None, "ln_final__weight": None}, ["missing: ", "visual.ln_pre.bias", "ln_final"]),
        ({"logit_bias": [1, 2]}, ["of another shape: logit_bias 2"]),
        ({"logit_shift": -10}, ["not part of this model: logit_shift"]),
        ({"visual__attn_pool__query": np.ones((4, 4))}, ["not part of this model: visual.attn_pool.query"]),
        ({"visual__ln_pre__bias": np.ones(64)}, ["of another shape: visual.ln_pre.bias 64"]),
        ({"visual__conv1__weight": np.ones((128, 1, 8, 8))}, ["of another shape", "visual.conv1.weight 128x1x8x8"]),
        ({"visual__positional_embedding": np.ones((9, 128))}, ["8 positions", "square"]),
        ({"visual__positional_embedding": np.ones(9)}, []),
        ({"visual__positional_embedding": np.ones((0, 128))}, []),
        ({"visual__conv1__weight": np.ones(9)}, []),
        ({"token_embedding__weight": 1}, []),
        ({"logit_scale": [1, 2]}, ["logit_scale"]),
    ],
)
def test_tensors_that_are_not_those_of_a_clip_are_named(refused, goldens, tmp_path, changes, words):
    file = openai_file(goldens, tmp_path, **changes)
    line = refused(file)
    assert all(word in line for word in [str(file), *words]), line
    with pytest.raises(WeightsError):
        read_weights(file)


def test_a_resnet_without_a_stage_is_told_what_is_missing(refused, goldens, tmp_path):
    tensors = goldens["openai_resnet/float32"].tensors()
    gone = {name.replace(".", "__"): None for name in tensors if name.startswith("visual.layer4.")}
    line = refused(openai_file(goldens, tmp_path, "openai_resnet/float32", **gone))
    assert "missing: visual.layer4.0.conv1.weight" in line
    assert "more" in line  # six of them are named


def test_a_file_of_quite_another_model(refused, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"encoder.weight": np.ones((4, 4), np.float32), "encoder.bias": np.ones(4, np.float32)}, file)
    line = refused(file)
    assert str(file) in line and "not the weights of a CLIP" in line


def test_heads_that_no_width_tells(refused, goldens, tmp_path):
    width = 96
    vision = {
        name.replace(".", "__"): np.ones([{128: width, 384: 3 * width, 512: 4 * width}.get(n, n) for n in array.shape])
        for name, array in goldens["openai_vit/float32"].tensors().items()
        if name.startswith("visual.")
    }
    line = refused(openai_file(goldens, tmp_path, **vision))
    assert "heads" in line and "96" in line and "vision" in line and "config" in line


def test_a_run_without_a_checkpoint_or_with_a_damaged_config(refused, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for text in ("{half", "[]", "{}", '{"model": {"embed_dim": 3}}', '{"model": null}'):
        (run / "config.json").write_text(text)
        assert str(run) in refused(run)


def test_a_folder_of_hugging_face_may_have_checkpoints_beside_the_model(goldens, tmp_path):
    shutil.copytree(goldens[HUGGING_FACE].path, tmp_path / "trained")
    (tmp_path / "trained/checkpoints").mkdir()
    assert read_weights(tmp_path / "trained").format == "Hugging Face"


@pytest.mark.parametrize(
    ("name", "format", "destination", "words"),
    [
        ("openai_resnet/float16", "huggingface", "a", ["huggingface has no ResNet", "open_clip"]),
        (OPEN_CLIP, "openai", "a.pt", ["activation=gelu", "open_clip"]),
        ("huggingface/quick_gelu", "openai", "a.pt", ["vision", "mlp_ratio=2"]),
        ("openai_vit/archive", "openai", "a", ["end in .pt"]),
        ("openai_vit/archive", "openai", "a.safetensors", ["end in .pt"]),
        ("openai_vit/archive", "clip_jax", "a.pt", ["clip_jax weights are a folder", ".pt"]),
        ("openai_vit/archive", "clip_jax", "a.safetensors", ["are a folder", ".safetensors"]),
        ("openai_vit/archive", "huggingface", "a.bin", ["are a folder", ".bin"]),
        ("openai_vit/archive", "open_clip", "a.pt", ["are a folder", ".pt"]),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(
    refused,
    goldens,
    name,
    format,  # noqa: A002
    destination,
    words,
):
    line = refused(goldens[name].path, f"--to={format}", destination=destination)
    assert all(word in line for word in words), line


def with_towers(weights, vision=None, text=None):
    preset = weights.preset
    return weights._replace(
        preset=dataclasses.replace(
            preset,
            vision=dataclasses.replace(preset.vision, **(vision or {})),
            text=dataclasses.replace(preset.text, **(text or {})),
        )
    )


def test_two_activations_or_other_heads_are_refused_where_a_format_has_no_words_for_them(goldens, tmp_path):
    weights = read_weights(goldens["openai_vit/archive"].path)
    mixed = with_towers(weights, text={"activation": "gelu"})
    for destination in (tmp_path / "folder", tmp_path / "file.safetensors"):
        with pytest.raises(WeightsError, match="one activation for both towers"):
            write_weights(mixed, destination, "open_clip")
    with pytest.raises(WeightsError, match="text tower with activation=gelu"):
        write_weights(mixed, tmp_path / "a.pt", "openai")
    with pytest.raises(WeightsError, match="vision tower whose heads are not 64 wide"):
        write_weights(with_towers(weights, vision={"num_heads": 4}), tmp_path / "a.pt", "openai")
    with pytest.raises(WeightsError, match="text tower whose heads are not 64 wide"):
        write_weights(with_towers(weights, text={"num_heads": 2}), tmp_path / "a.pt", "openai")
    resnet = read_weights(goldens["openai_resnet/float16"].path)
    with pytest.raises(WeightsError, match="vision tower whose heads are not 64 wide"):
        write_weights(with_towers(resnet, vision={"num_heads": 4}), tmp_path / "a.pt", "openai")
    assert list(tmp_path.iterdir()) == []
    write_weights(mixed, tmp_path / "hf", "huggingface")
    assert read_weights(tmp_path / "hf").preset == mixed.preset


def test_a_destination_that_is_there_is_left_as_it_is(refused, goldens, tmp_path):
    (tmp_path / "target/folder").mkdir(parents=True)
    (tmp_path / "target/file.pt").write_bytes(b"precious")
    source = goldens["openai_vit/archive"].path
    for format in ("clip_jax", "open_clip", "huggingface"):  # noqa: A001
        assert "is there already" in refused(source, f"--to={format}", destination="folder")
    assert "is there already" in refused(source, "--to=openai", destination="file.pt")
    assert list((tmp_path / "target/folder").iterdir()) == []
    assert (tmp_path / "target/file.pt").read_bytes() == b"precious"
    with pytest.raises(FileExistsError):
        write_weights(read_weights(source), tmp_path / "target/folder", "clip_jax")


def test_a_destination_that_cannot_be_made(refused, goldens, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").write_text("")
    assert main([str(goldens["openai_vit/archive"].path), str(tmp_path / "target/file/below")]) == 2


def test_an_unknown_format(goldens, tmp_path, capsys):
    weights = read_weights(goldens["openai_vit/archive"].path)
    with pytest.raises(WeightsError, match=r"'onnx' is not a format.*clip_jax, open_clip, huggingface, openai"):
        write_weights(weights, tmp_path / "a", "onnx")
    assert main([str(goldens["openai_vit/archive"].path), str(tmp_path / "a"), "--to=onnx"]) == 2
    assert "onnx" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "destination", "writer"),
    [
        ("clip_jax", "folder", "run_folder.save_variables"),
        ("open_clip", "folder", "weights.open_clip.save_file"),
        ("open_clip", "file.safetensors", "weights.open_clip.save_file"),
        ("huggingface", "folder", "weights.huggingface.save_file"),
        ("openai", "file.pt", "weights.openai.write_torch_file"),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    refused,
    goldens,
    monkeypatch,
    format,  # noqa: A002
    destination,
    writer,
):
    reached = []

    def fill_up(*arguments, **_):
        [path] = [pathlib.Path(argument) for argument in arguments if isinstance(argument, os.PathLike)]
        (path / "half" if path.is_dir() else path).write_bytes(b"half")
        reached.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"clip_jax.{writer}", fill_up)
    line = refused(goldens["openai_vit/archive"].path, f"--to={format}", destination=destination, code=1)
    assert "No space left on device" in line
    assert reached
