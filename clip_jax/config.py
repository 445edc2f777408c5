"""The whole config tree with its defaults, and every check of it that needs no device.

A file under ``configs/`` returns :func:`default_config` for a preset with its differences. The tree is locked: a
key that isn't here is a mistake.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
from collections.abc import Iterator

import ml_collections

from clip_jax.data.images import Augmentation
from clip_jax.data.tokenizer import VOCAB_SIZE
from clip_jax.models.execution import DTYPES
from clip_jax.models.presets import CLIPPreset, get_preset, model_preset, preset_from_dict
from clip_jax.models.presets import problems as model_problems

LOSS_KINDS = ("softmax", "sigmoid")
LOSS_FORMS = ("auto", "gather", "blockwise")

# What may change between a run and its resumption without making it another run; "evaluation." may, too.
NOT_PART_OF_A_RUN = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoints_to_keep",
    "data.num_workers",
    "data.num_threads",
    "data.cache_mebibytes",
    "data.max_bad_share",
    "data.bucket_timeout",
    "data.bucket_retries",
    "data.bucket_connections",
    "data.weights",  # part of the fingerprint, too
    "accumulation_steps",
    "mesh.fsdp",
    "loss.form",
    "loss.block_size",
    "model.remat",
    "model.scan_unroll",
    "model.fused_attention",
    "init_from",  # read by a run that has no checkpoint of its own
    "data.source",  # the fingerprint of what it holds is compared instead, so data may be moved
)


def default_config(preset: str | CLIPPreset) -> ml_collections.ConfigDict:
    """The paper's training of this preset (tables 18 to 20), with no data named and no evaluation.

    Args:
      preset: its name in :data:`clip_jax.models.presets.PRESETS`, or one that is not there: "custom" is its name.

    Raises:
      ValueError: the preset is unknown.
    """
    name, preset = (preset, get_preset(preset)) if isinstance(preset, str) else ("custom", preset)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.init_from = ""  # a run or weights to start from instead of from scratch; another image size is resized to
    config.global_batch_size = 32_768  # pairs a step, over all devices
    config.accumulation_steps = 1  # parts of a batch whose activations are held at a time; the gradient is the same
    config.epochs = 32.0  # over the source
    config.steps = 0  # if not 0, ends the training here whatever epochs says; the schedule spans it
    config.log_every = 10  # steps
    config.eval_every = 0  # steps; 0: only at the end
    config.checkpoint_every = 1_000  # steps; the last step is always saved
    config.checkpoints_to_keep = 3

    config.model = ml_collections.ConfigDict(dataclasses.asdict(preset))
    config.model.name = name
    config.model.remat = "none"  # or "lite", "attention", "full": how much of a layer the backward pass recomputes
    config.model.patch_dropout = 0.0  # share of an image's patches that training leaves out, other ones in each step
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan_unroll = 0  # layers in one step of the scan over layers; 0: by the kind of device
    config.model.fused_attention = True  # by cuDNN where that can be: on a GPU, in bfloat16; the same function

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.beta1 = 0.9
    config.optimizer.update(preset.vision.optimizer_defaults)  # beta2 and epsilon
    config.optimizer.weight_decay = 0.2
    config.optimizer.first_moment_dtype = "float32"  # or "bfloat16": of Adam's mean of the gradients
    config.optimizer.gradient_clip_norm = 0.0  # global norm; 0: no clipping

    config.loss = ml_collections.ConfigDict()
    config.loss.kind = "softmax"  # the paper's; or "sigmoid", SigLIP's
    # Of the softmax loss: "gather", or "blockwise" for batches whose similarities do not fit; auto: by their size.
    config.loss.form = "auto"
    config.loss.block_size = 0  # of the blockwise form, and of the sigmoid loss; 0: by the kind of device

    config.mesh = ml_collections.ConfigDict()
    config.mesh.fsdp = 0  # devices that share one copy of the parameters; 0: by the model and a device's memory

    config.progressive_resolution = ml_collections.ConfigDict()
    config.progressive_resolution.image_size = 0  # px of the first steps' images; 0: the model's from the start
    config.progressive_resolution.steps = 0  # how many those are

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # see clip_jax.data.sources; several are joined by " + "
    config.data.weights = ""  # how much is drawn of each of several sources, as 3:1; empty: each pair alike
    config.data.min_image_side = 1  # px; smaller pictures are replaced, as all bad samples are
    config.data.max_aspect_ratio = 100.0  # so are longer and thinner ones
    config.data.max_bad_share = 0.1  # of the samples; more bad ones end the run
    config.data.num_workers = 4  # processes that decode; 0: threads of this process
    config.data.num_threads = 1  # in each; more where pictures come from afar, one by one
    config.data.cache_mebibytes = 0  # of decoded images that each worker keeps, for small data sets seen many times
    config.data.bucket_timeout = 15.0  # seconds for an answer of up to 8 MiB from gs://, s3:// or a web server
    config.data.bucket_retries = 2  # after the first try; then a record is bad, and a source cannot be opened
    config.data.bucket_connections = 32  # at most, of each process
    config.data.augmentation = ml_collections.ConfigDict(dataclasses.asdict(Augmentation()))

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.tasks = ""  # as --tasks of python -m clip_jax.evaluate; empty: none
    config.evaluation.data = "~/data"  # the folder of the tasks' data
    config.evaluation.batch_size = 256  # over all devices
    config.lock()
    return config


def load_config_file(path: str) -> ml_collections.ConfigDict:
    """Runs a config file's ``get_config``; ``configs/NAME.py`` or NAME may also be a packaged config.

    Raises:
      FileNotFoundError: neither is there; the message lists the packaged ones.
      ValueError: the file cannot be run, or does not return a config.
    """
    packaged = pathlib.Path(__file__).parent / "configs"  # in an installed wheel
    if not packaged.is_dir():
        packaged = pathlib.Path(__file__).parent.parent / "configs"
    file = pathlib.Path(path).expanduser()
    if not file.is_file() and str(file.parent) in (".", "configs"):
        file = packaged / file.with_suffix(".py").name
    if not file.is_file():
        names = ", ".join(sorted(f"configs/{candidate.name}" for candidate in packaged.glob("*.py")))
        raise FileNotFoundError(f"no config file {path!r}; the packaged ones are {names}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever the file's own code provokes
        raise ValueError(f"config file {file}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"config file {file}: get_config() must return what clip_jax.config.default_config() returns")
    return config


def _leaves(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
    """``{"data.source": ..., ...}``: every leaf by its dotted name."""
    return dict(_leaves(config))


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets the leaf of this dotted name from what was typed, read as the type that the leaf has.

    Raises:
      ValueError: no such leaf (the message names the nearest), or the text is not of its type.
    """
    leaves = flatten(config)
    if name not in leaves:
        near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.0)[0]
        raise ValueError(f"--config.{name}: there is no such key; did you mean --config.{near}?")
    kind = type(leaves[name])
    readers = {
        bool: lambda text: {"true": True, "false": False}[text.lower()],
        tuple: lambda text: tuple(type(leaves[name][0])(part) for part in text.strip("()[]").split(",")),
    }
    try:
        value = readers.get(kind, kind)(text)
    except (ValueError, KeyError):
        wanted = f"{type(leaves[name][0]).__name__}, ..." if kind is tuple else kind.__name__
        raise ValueError(f"--config.{name}={text}: not a value of type {wanted}") from None
    *parents, key = name.split(".")
    for parent in parents:
        config = config[parent]
    config[key] = value


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks all that can be known without data and devices, and reports all that is wrong together.

    Raises:
      ValueError: one line for each mistake: which key, what is wrong, the mend.
    """
    problems = []

    def check(condition: bool, problem: str) -> None:
        if not condition:
            problems.append(problem)

    def check_progressive_resolution() -> None:
        first, vision = config.progressive_resolution, model_preset(config).vision
        name, unit, whole = "config.progressive_resolution", vision.side_unit, vision.image_size
        check(first.steps >= 0, f"{name}.steps must not be negative")
        check(
            bool(first.image_size) == bool(first.steps),
            f"{name} needs both image_size and steps, or neither; they are {first.image_size} and {first.steps}",
        )
        check(
            first.image_size % unit == 0 and 0 <= first.image_size < whole,
            f"{name}.image_size={first.image_size} must be a multiple of {unit} below the model's {whole}",
        )

    optimizer, data = config.optimizer, config.data
    infinite = [
        name
        for name, value in flatten(config).items()
        if any(
            isinstance(one, float) and not math.isfinite(one) for one in (value if type(value) is tuple else [value])
        )
    ]
    if infinite:
        raise ValueError("\n".join(f"config.{name} must be a finite number" for name in infinite))
    check(
        bool(data.source),
        "no data: name some with --config.data.source=folder:/pictures, csv:/pairs.csv or wds:/data/{00000..00099}.tar",
    )
    check(config.steps > 0 or config.epochs > 0, "config.steps or config.epochs must be positive")
    check(config.steps >= 0, f"config.steps={config.steps} must not be negative")
    check(config.global_batch_size > 1, f"config.global_batch_size={config.global_batch_size} must be at least 2")
    check(0 <= config.seed < 2**32, f"config.seed={config.seed} must be in [0, 2**32)")
    for key in (
        "accumulation_steps",
        "log_every",
        "checkpoint_every",
        "checkpoints_to_keep",
        "evaluation.batch_size",
    ):
        check(flatten(config)[key] > 0, f"config.{key} must be positive")
    for key in ("mesh.fsdp", "eval_every", "loss.block_size"):
        check(flatten(config)[key] >= 0, f"config.{key} must not be negative")
    check(data.min_image_side > 0, f"config.data.min_image_side={data.min_image_side} must be positive")
    check(data.max_aspect_ratio >= 1, f"config.data.max_aspect_ratio={data.max_aspect_ratio} must be at least 1")
    check(0 <= data.max_bad_share <= 1, f"config.data.max_bad_share={data.max_bad_share} must be in [0, 1]")
    for key in ("num_threads", "bucket_timeout", "bucket_connections"):
        check(data[key] > 0, f"config.data.{key} must be positive")
    for key in ("num_workers", "cache_mebibytes", "bucket_retries"):
        check(data[key] >= 0, f"config.data.{key} must not be negative")
    check(
        config.loss.kind in LOSS_KINDS, f"config.loss.kind={config.loss.kind!r} must be one of {', '.join(LOSS_KINDS)}"
    )
    check(
        config.loss.form in LOSS_FORMS, f"config.loss.form={config.loss.form!r} must be one of {', '.join(LOSS_FORMS)}"
    )
    of_the_model = model_problems(config.model)
    problems.extend(of_the_model)
    vocab_size = config.model.text.get("vocab_size", VOCAB_SIZE)  # that a section lacks it is among the above
    check(
        vocab_size >= VOCAB_SIZE,
        f"config.model.text.vocab_size={vocab_size} must be at least the tokenizer's {VOCAB_SIZE}",
    )
    if not any(problem.startswith("config.model.vision") for problem in of_the_model):
        check_progressive_resolution()
    check(optimizer.learning_rate > 0, "config.optimizer.learning_rate must be positive")
    for key in ("warmup_steps", "weight_decay", "gradient_clip_norm"):
        check(optimizer[key] >= 0, f"config.optimizer.{key} must not be negative")
    check(
        optimizer.first_moment_dtype in DTYPES,
        f"config.optimizer.first_moment_dtype={optimizer.first_moment_dtype!r} must be one of {', '.join(DTYPES)}",
    )
    check(optimizer.epsilon > 0, "config.optimizer.epsilon must be positive")
    check(config.steps < 2**31, "config.steps must be below 2**31")
    for name, strength in data.augmentation.items():
        most = 180 if name in ("rotation", "hue") else 16 if name == "blur" else 1
        check(0 <= strength <= most, f"config.data.augmentation.{name}={strength} must be in [0, {most}]")
    for key in ("beta1", "beta2"):
        check(0 <= optimizer[key] < 1, f"config.optimizer.{key}={optimizer[key]} must be in [0, 1)")
    if problems:
        raise ValueError("\n".join(problems))


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def check_same_run(config: ml_collections.ConfigDict, saved: dict, where: str) -> None:
    """Refuses to go on in the folder of another run.

    Raises:
      ValueError: some keys that make a run differ; they are listed with both values.
    """
    if "converted_from" in saved:
        raise ValueError(
            f"{where} holds weights converted from {saved['converted_from']}, not a run; start from them with "
            f"--config.init_from={where} and another --workdir"
        )
    now = flatten(ml_collections.ConfigDict(json.loads(to_json(config))))  # JSON knows no tuples
    before = flatten(ml_collections.ConfigDict(saved))
    # What an older version of the program did not know yet was as the defaults are; what only it knew is no sign.
    try:
        default = default_config(preset_from_dict(saved["model"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} holds a run of an unknown model ({error}); choose another --workdir") from None
    defaults = flatten(ml_collections.ConfigDict(json.loads(to_json(default))))
    before |= {name: defaults[name] for name in now.keys() & defaults.keys() if name not in before}
    different = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(now.keys() & before.keys())
        if now[name] != before[name] and name not in NOT_PART_OF_A_RUN and not name.startswith("evaluation.")
    ]
    if different:
        raise ValueError(f"{where} holds a run of another config ({'; '.join(different)}); choose another --workdir")
