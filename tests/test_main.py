"""What a person types and what they get back: one line and exit code 2 for each mistake."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.config import check_same_run, load_config_file, to_json, validate
from clip_jax.main import main, parse_arguments
from clip_jax.models.presets import get_preset, model_preset
from clip_jax.training.preparation import prepare

pytestmark = pytest.mark.usefixtures("one_device")

QUICKSTART = "--config=configs/quickstart.py"

# The paper's models: preset, learning rate, epochs.
PUBLISHED = {
    "rn50": ("RN50", 5e-4, 32),
    "rn101": ("RN101", 5e-4, 32),
    "rn50x4": ("RN50x4", 5e-4, 32),
    "rn50x16": ("RN50x16", 4e-4, 32),
    "rn50x64": ("RN50x64", 3.6e-4, 32),
    "vit_b32": ("ViT-B/32", 5e-4, 32),
    "vit_b16": ("ViT-B/16", 5e-4, 32),
    "vit_l14": ("ViT-L/14", 4e-4, 32),
    "vit_l14_336": ("ViT-L/14@336", 2e-5, 1),
}


@pytest.fixture
def image_folder(tmp_path):
    """A folder of eight images with captions, and a CSV of them."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["path,text"]
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"noise number {index}\nanother caption\n")
        rows.append(f"images/{index}.png,noise number {index}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def small_vit_l14(source: str, workdir) -> list[str]:
    return [
        "--config=configs/vit_l14.py",
        f"--config.data.source={source}",
        f"--workdir={workdir}",
        "--config.steps=2",
        "--config.log_every=1",
        "--config.global_batch_size=8",
        "--config.data.num_workers=0",
        "--config.model.vision.num_layers=1",
        "--config.model.text.num_layers=1",
        "--config.model.vision.width=64",
        "--config.model.vision.num_heads=1",
        "--config.model.vision.image_size=28",
        "--config.model.text.width=64",
        "--config.model.text.num_heads=1",
    ]


def mistake(capsys, *arguments: str) -> str:
    """The one line of an error; there is no traceback and nothing else."""
    assert main(list(arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_wrong_key_is_told_with_the_nearest_right_one(capsys):
    assert "--config.steps?" in mistake(capsys, QUICKSTART, "--config.stepz=3")
    assert "--config.model.vision.width?" in mistake(capsys, QUICKSTART, "--config.model.vision.widht=3")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.steps=many", "must be a whole number"),
        ("--config.steps=1.5", "must be a whole number"),
        ("--config.optimizer.learning_rate=fast", "must be a number"),
        ("--config.steps", "has no value"),
        ("--confg.steps=1", "unknown argument"),
        ("--config.global_batch_size=0", "at least 2"),
        ("--config.model.dtype=float17", "float32, bfloat16"),
        ("--config.model.vision.patch_size=7", "must divide image_size"),
        ("--config.optimizer.beta2=1", "in [0, 1)"),
        ("--config.evaluation.tasks=emoji_style", "did you mean 'emoji_unseen_style'?"),
        ("--config.data.source=emoji:apple/train", "noto, twemoji, openmoji"),
        ("--config.data.source=/data", "is not a source"),
        ("--config.optimizer.learning_rate=inf", "finite"),
        ("--config.optimizer.epsilon=-1", "epsilon must be positive"),
        ("--config.data.augmentation.grayscale=1.5", "must be in [0, 1]"),
        ("--config.model.text.vocab_size=100", "at least the tokenizer's 49408"),
        ("--config.evaluation.tasks=birdsnap", "birdsnap: no folder"),
        ("--config.model.vision.activation=relu", "vision.activation='relu' must be one of quick_gelu, gelu"),
        ("--config.model.text.activation=GELU", "text.activation='GELU' must be one of quick_gelu, gelu"),
        ("--config.model.vision.mlp_ratio=0", "config.model.vision.mlp_ratio=0.0 leaves nothing of width"),
        ("--config.model.text.mlp_ratio=-4", "config.model.text.mlp_ratio=-4.0 leaves nothing of width"),
        ("--config.model.vision.num_heads=3", "config.model.vision.num_heads=3 must divide width=128"),
        ("--config.model.vision.stage_sizes=1,1,1,1", "no such key"),
        ("--config.model.remat=some", "must be one of none, lite, attention, full"),
        ("--config.model.patch_dropout=1", "config.model.patch_dropout=1.0 must be in [0, 1)"),
        ("--config.loss.kind=triplet", "config.loss.kind='triplet' must be one of softmax, sigmoid"),
        ("--config.mesh.fsdp=-1", "config.mesh.fsdp must not be negative"),
        ("--config.progressive_resolution.image_size=16", "needs both image_size and steps, or neither"),
        ("--config.progressive_resolution.steps=5", "needs both image_size and steps, or neither"),
    ],
)
def test_a_wrong_value_is_one_line(capsys, tmp_path, argument, expected):
    workdir = tmp_path / "run"
    assert expected in mistake(capsys, QUICKSTART, f"--workdir={workdir}", argument)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("image_size=225", "config.model.vision.image_size=225 must be a multiple of 32"),
        ("image_size=0", "config.model.vision.image_size=0 must be positive"),
        ("width=63", "config.model.vision.width=63 must be even"),
        ("num_heads=7", "config.model.vision.num_heads=7 must divide the last stage's 2048 channels"),
        ("batch_norm=local", "config.model.vision.batch_norm='local' must be one of global, per_device"),
        ("stage_sizes=1,2,1", "must be four positive numbers"),
        ("stage_sizes=1,2,1,1,1", "must be four positive numbers"),
        ("stage_sizes=1,2,0,1", "must be four positive numbers"),
        ("stage_sizes=1,2,one,1", "must be a whole number"),
        ("stage_sizes=", "must be a whole number"),
        ("patch_size=16", "no such key"),
        ("activation=gelu", "no such key"),
    ],
)
def test_a_wrong_value_of_a_resnet_is_one_line(capsys, tmp_path, argument, expected):
    arguments = ["--config=configs/rn50.py", "--config.data.source=folder:/images", f"--workdir={tmp_path}/run"]
    assert expected in mistake(capsys, *arguments, f"--config.model.vision.{argument}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        ("quickstart", 24, "config.progressive_resolution.image_size=24 must be a multiple of 16 below the model's 32"),
        ("quickstart", 32, "must be a multiple of 16 below the model's 32"),
        ("rn50", 100, "config.progressive_resolution.image_size=100 must be a multiple of 32 below the model's 224"),
    ],
)
def test_a_first_resolution_that_does_not_fit_is_one_line(capsys, tmp_path, config, size, expected):
    first = [f"--config.progressive_resolution.image_size={size}", "--config.progressive_resolution.steps=10"]
    arguments = [f"--config=configs/{config}.py", "--config.data.source=folder:/images", f"--workdir={tmp_path}/run"]
    assert expected in mistake(capsys, *arguments, *first)


def test_a_resnet_has_no_patches_to_leave_out(capsys, tmp_path):
    arguments = ["--config=configs/rn50.py", "--config.data.source=folder:/images", f"--workdir={tmp_path}/run"]
    assert "has no patches to leave out" in mistake(capsys, *arguments, "--config.model.patch_dropout=0.5")


@pytest.mark.parametrize("text", ["1,2,1,1", "(1,2,1,1)", "(1, 2, 1, 1)"])
def test_stage_sizes_are_read_as_four_numbers(text):
    config, _, _ = parse_arguments(["--config=configs/rn50.py", f"--config.model.vision.stage_sizes={text}"])
    assert config.model.vision.stage_sizes == (1, 2, 1, 1)
    assert model_preset(config).vision.stage_sizes == (1, 2, 1, 1)


def test_a_config_that_is_not_there_is_told_with_those_that_are(capsys):
    assert "configs/vit_l14.py" in mistake(capsys, "--config=configs/vit_g.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config(): return None", "default_config"),
        (
            "from clip_jax.config import default_config\n"
            "def get_config():\n  config = default_config('ViT-B/32')\n  config.stepz = 3\n  return config",
            "stepz",
        ),
    ],
)
def test_a_config_file_that_does_not_work_is_one_line(capsys, tmp_path, text, expected):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = mistake(capsys, f"--config={file}")
    assert str(file) in message
    assert expected in message


def test_a_mistyped_folder_of_a_config_does_not_fall_back_to_a_packaged_one(capsys):
    assert "no config file 'mine/vit_l14.py'" in mistake(capsys, "--config=mine/vit_l14.py")


def test_a_workdir_that_cannot_be_one_is_told_before_anything_is_written(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below"):
        assert "is not a folder" in mistake(capsys, QUICKSTART, f"--workdir={workdir}")
    assert "mount a bucket" in mistake(capsys, QUICKSTART, "--workdir=gs://bucket/run")
    (tmp_path / "config.json").write_text("{half")
    assert "config.json is damaged" in mistake(capsys, QUICKSTART, f"--workdir={tmp_path}")


def test_a_pod_named_in_part_is_told(capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID" in mistake(capsys, QUICKSTART)


def test_all_mistakes_of_a_config_are_told_together(capsys):
    assert main([QUICKSTART, "--config.model.dtype=int8", "--config.log_every=0", "--config.optimizer.beta1=2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_config_of_a_published_model_without_data_says_how_to_name_some(capsys):
    assert "--config.data.source=folder:" in mistake(capsys, "--config=configs/vit_l14.py")


def test_a_batch_that_the_devices_cannot_share_is_told_with_sizes_that_fit(
    capsys, monkeypatch, mesh_of, tmp_path, image_folder
):
    monkeypatch.setattr(jax, "devices", lambda: list(mesh_of((8, 1)).devices.flat))
    arguments = [*small_vit_l14(f"folder:{image_folder}", tmp_path / "run"), "--config.global_batch_size=12"]
    assert "8 or 16 can" in mistake(capsys, *arguments)
    assert "does not divide the 8 devices" in mistake(capsys, *arguments, "--config.mesh.fsdp=3")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_source_is_one_line(capsys, tmp_path, image_folder):
    arguments = [*small_vit_l14(f"folder:{image_folder}", tmp_path / "run"), "--config.global_batch_size=9"]
    assert "config.global_batch_size=9 is more than the 8 pairs of config.data.source=" in mistake(capsys, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("image_folder")
def test_missing_data_is_one_line(capsys, tmp_path):
    workdir = tmp_path / "run"
    assert "no folder" in mistake(capsys, *small_vit_l14(f"folder:{tmp_path}/none", workdir))
    assert "no file" in mistake(capsys, *small_vit_l14(f"csv:{tmp_path}/none.csv", workdir))
    assert "match" in mistake(capsys, *small_vit_l14(f"array_record:{tmp_path}/none-*", workdir))
    message = mistake(capsys, *small_vit_l14(f"csv:{tmp_path}/pairs.csv?image=path", workdir))
    assert "no column 'caption', only path, text" in message
    assert not workdir.exists()


def test_data_whose_first_images_are_all_broken_is_refused(capsys, tmp_path, image_folder):
    for index in range(8):
        (image_folder / f"{index}.png").write_bytes(b"not an image")
    message = mistake(capsys, *small_vit_l14(f"folder:{image_folder}", tmp_path / "run"))
    assert "none of its first 8 pairs can be used: the image of " in message and "0.png" in message
    assert not (tmp_path / "run").exists()


def test_data_whose_first_pairs_are_bad_is_used(tmp_path, image_folder):
    (image_folder / "0.png").write_bytes(b"not an image")
    (image_folder / "1.txt").unlink()
    (image_folder / "2.txt").write_bytes(b"\xff\xff\xff")
    config, _, _ = parse_arguments(small_vit_l14(f"folder:{image_folder}", tmp_path / "run"))
    assert len(prepare(config, str(tmp_path / "run")).mixture) == 8


@pytest.mark.parametrize("kind", ["folder", pytest.param("csv", marks=pytest.mark.slow)])
def test_vit_l14_at_reduced_depth_trains_two_steps_on_eight_images(capsys, tmp_path, image_folder, kind):
    source = f"folder:{image_folder}" if kind == "folder" else f"csv:{tmp_path}/pairs.csv?image=path&caption=text"
    assert main(small_vit_l14(source, tmp_path / "run")) == 0
    output = capsys.readouterr().out
    assert "step 2/2" in output
    assert "python -m clip_jax.predict --model=" in output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    # Two captions or one per image, eight pairs a batch: an untrained model is near chance.
    assert 1.5 < records[0]["loss"] < 6


def test_a_broken_image_in_the_middle_is_replaced_counted_and_named(capsys, tmp_path, image_folder):
    image = image_folder / "5.png"
    image.write_bytes(image.read_bytes()[:200])
    assert main(small_vit_l14(f"folder:{image_folder}", tmp_path / "run")) == 0
    output = capsys.readouterr().out
    named = [line for line in output.splitlines() if "5.png" in line]
    assert len(named) == 1  # though it came up in each of the two epochs
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["bad_samples/undecodable"] == 2


def test_the_folder_of_another_run_is_refused_and_left_as_it_is(capsys, tmp_path, image_folder):
    arguments = small_vit_l14(f"folder:{image_folder}", tmp_path / "run")
    assert main(arguments) == 0
    capsys.readouterr()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    assert "seed was 0 and is 1" in mistake(capsys, *arguments, "--config.seed=1")
    (image_folder / "7.txt").write_text("another caption than it was trained with\n")
    assert "was trained on other data" in mistake(capsys, *arguments)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_a_run_of_an_older_version_had_what_is_now_the_default(tmp_path):
    config, _, _ = parse_arguments([QUICKSTART])
    saved = json.loads(to_json(config))
    for part, key in (("loss", "kind"), ("model", "patch_dropout")):
        del saved[part][key]
    check_same_run(config, saved, "the folder")
    config.model.patch_dropout = 0.5
    with pytest.raises(ValueError, match=r"model\.patch_dropout was 0\.0 and is 0\.5"):
        check_same_run(config, saved, "the folder")


def test_a_resnets_run_is_known_again_though_json_has_lists_for_its_tuples(tmp_path, image_folder):
    arguments = [
        "--config=configs/rn50.py",
        f"--config.data.source=folder:{image_folder}",
        "--config.global_batch_size=8",
        "--config.model.vision.stage_sizes=1,2,1,1",
    ]
    config, _, _ = parse_arguments(arguments)
    (tmp_path / "config.json").write_text(to_json(config))
    prepare(config, str(tmp_path))
    for other, told in (
        ("stage_sizes=1,1,1,1", r"model\.vision\.stage_sizes was .1, 2, 1, 1. and is .1, 1, 1, 1."),
        ("batch_norm=per_device", "model.vision.batch_norm was 'global' and is 'per_device'"),
    ):
        changed, _, _ = parse_arguments([*arguments, f"--config.model.vision.{other}"])
        with pytest.raises(ValueError, match=told):
            prepare(changed, str(tmp_path))


@pytest.mark.parametrize("name", ["quickstart", "clipart_vit_s16", *PUBLISHED])
def test_every_config_takes_overrides_and_passes_its_own_checks(name):
    config, workdir, _ = parse_arguments(
        [f"--config=configs/{name}.py", "--config.steps=5", "--config.data.source=folder:/images"]
    )
    validate(config)
    assert config.steps == 5
    assert workdir == f"runs/{name}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_a_published_model_trains_as_the_paper_says(name):
    """Tables 18 to 20."""
    preset, rate, epochs = PUBLISHED[name]
    config = load_config_file(f"configs/{name}.py")
    assert model_preset(config) == get_preset(preset)
    assert config.model.name == preset
    optimizer = config.optimizer
    assert (optimizer.learning_rate, config.epochs, config.steps) == (rate, epochs, 0)
    assert (config.global_batch_size, optimizer.warmup_steps, optimizer.weight_decay) == (32_768, 2_000, 0.2)
    beta2, epsilon = (0.999, 1e-8) if name.startswith("rn") else (0.98, 1e-6)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, beta2, epsilon)


def test_only_vit_l14_at_336_pixels_starts_from_another_run():
    assert {name: load_config_file(f"configs/{name}.py").init_from for name in PUBLISHED} == {
        name: "runs/vit_l14" if name == "vit_l14_336" else "" for name in PUBLISHED
    }


def test_every_packaged_config_is_tested_here():
    assert {file.stem for file in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")} == {
        "quickstart",
        "clipart_vit_s16",
        *PUBLISHED,
    }
