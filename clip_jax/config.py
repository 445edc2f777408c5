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

from clip_jax.data.settings import DataSettings
from clip_jax.data.tokenizer import VOCAB_SIZE
from clip_jax.errors import one_line
from clip_jax.evaluation.settings import EvaluationSettings
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import ACTIVATIONS, BATCH_NORMS, RESNET_REDUCTION, ResNetPreset, get_preset
from clip_jax.settings import (
    DTYPES,
    changeable,
    may_change,
    must_be,
    must_be_positive,
    must_not_be_negative,
    read_section,
)
from clip_jax.sharding import MeshSettings
from clip_jax.training.optimizer import OptimizerSettings

LOSS_KINDS = ("softmax", "sigmoid")
LOSS_FORMS = ("auto", "gather", "blockwise")
REMAT_POLICIES = ("none", "lite", "attention", "full")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Defaults of the keys that belong to no section; of the paper's training (tables 18 to 20)."""

    seed: int = 0
    # A run or weights to start from instead of from scratch; another image size is resized to. A run with a checkpoint
    # of its own does not read it.
    init_from: str = may_change("")
    global_batch_size: int = 32_768  # pairs in a step, over all devices
    accumulation_steps: int = may_change(1)  # parts of a batch with activations in memory; the gradient is the same
    epochs: float = 32.0  # over the source
    steps: int = 0  # if not 0, the training ends here whatever epochs says; the schedule spans it
    log_every: int = may_change(10)  # steps
    eval_every: int = may_change(0)  # steps; 0: only at the end
    checkpoint_every: int = may_change(1_000)  # steps; the last step is always saved
    checkpoints_to_keep: int = may_change(3)

    def problems(self) -> list[str]:
        """One line for each value that cannot be used."""
        return [
            *must_be(self.steps > 0 or self.epochs > 0, "config.steps or config.epochs must be positive"),
            *must_be(0 <= self.steps < 2**31, f"config.steps={self.steps} must be in [0, 2**31)"),
            *must_be(
                self.global_batch_size > 1, f"config.global_batch_size={self.global_batch_size} must be at least 2"
            ),
            *must_be(0 <= self.seed < 2**32, f"config.seed={self.seed} must be in [0, 2**32)"),
            *must_be_positive(
                self, ("accumulation_steps", "log_every", "checkpoint_every", "checkpoints_to_keep"), "config"
            ),
            *must_not_be_negative(self, ("eval_every",), "config"),
        ]


@dataclasses.dataclass(frozen=True)
class ProgressiveResolutionSettings:
    """Defaults of ``config.progressive_resolution``: the model's own image size from the start."""

    image_size: int = 0  # px, of the first steps' images
    steps: int = 0  # how many steps those are


SECTIONS = {
    "optimizer": OptimizerSettings,
    "mesh": MeshSettings,
    "progressive_resolution": ProgressiveResolutionSettings,
    "data": DataSettings,
    "evaluation": EvaluationSettings,
}
MAY_CHANGE = {
    *changeable(RunSettings),
    *(f"{section}.{name}" for section, settings in SECTIONS.items() for name in changeable(settings)),
    "loss.form",
    "loss.block_size",
    "model.remat",
    "model.scan_unroll",
    "model.fused_attention",
}


def default_config(preset: str) -> ml_collections.ConfigDict:
    """The paper's training of this preset (tables 18 to 20), with no data named and no evaluation.

    Raises:
      ValueError: the preset is unknown.
    """
    config = ml_collections.ConfigDict(dataclasses.asdict(RunSettings()))
    config.model = ml_collections.ConfigDict(dataclasses.asdict(get_preset(preset)))
    config.model.name = preset
    config.model.remat = "none"  # or "lite", "attention", "full": how much of a layer the backward pass recomputes
    config.model.patch_dropout = 0.0  # share of an image's patches that training leaves out, other ones in each step
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan_unroll = 0  # layers in one step of the scan over layers; 0: by the kind of device
    config.model.fused_attention = True  # by cuDNN where that can be: on a GPU, in bfloat16; the same function

    config.loss = ml_collections.ConfigDict()
    config.loss.kind = "softmax"  # the paper's; or "sigmoid", SigLIP's
    # Of the softmax loss: "gather", or "blockwise" for batches whose similarities do not fit; auto: by their size.
    config.loss.form = "auto"
    config.loss.block_size = 0  # of the blockwise form, and of the sigmoid loss; 0: by the kind of device

    for name, section in SECTIONS.items():
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(section()))
    if isinstance(get_preset(preset).vision, ResNetPreset):
        config.optimizer.update(beta2=0.999, epsilon=1e-8)
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
        raise ValueError(f"config file {file}: {type(error).__name__}: {one_line(error)}") from None
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

    def check_transformer(tower: str, part: ml_collections.ConfigDict) -> None:
        prefix = f"config.model.{tower}"
        check(part.width % part.num_heads == 0, f"{prefix}.num_heads={part.num_heads} must divide width={part.width}")
        check(
            round(part.width * part.mlp_ratio) > 0,
            f"{prefix}.mlp_ratio={part.mlp_ratio} leaves nothing of width={part.width}",
        )
        check(
            part.activation in ACTIVATIONS,
            f"{prefix}.activation={part.activation!r} must be one of {', '.join(ACTIVATIONS)}",
        )

    def check_resnet(vision: ml_collections.ConfigDict) -> None:
        prefix, channels = "config.model.vision", RESNET_REDUCTION * vision.width
        check(
            vision.image_size % RESNET_REDUCTION == 0,
            f"{prefix}.image_size={vision.image_size} must be a multiple of {RESNET_REDUCTION}",
        )
        check(vision.width % 2 == 0, f"{prefix}.width={vision.width} must be even: the stem starts with half of it")
        check(
            channels % vision.num_heads == 0,
            f"{prefix}.num_heads={vision.num_heads} must divide the last stage's {channels} channels",
        )
        check(
            len(vision.stage_sizes) == 4 and min(vision.stage_sizes) > 0,
            f"{prefix}.stage_sizes={vision.stage_sizes} must be four positive numbers",
        )
        check(
            vision.batch_norm in BATCH_NORMS,
            f"{prefix}.batch_norm={vision.batch_norm!r} must be one of {', '.join(BATCH_NORMS)}",
        )

    def check_progressive_resolution(resnet: bool) -> None:
        first, whole = config.progressive_resolution, config.model.vision.image_size
        name = "config.progressive_resolution"
        unit = RESNET_REDUCTION if resnet else config.model.vision.patch_size
        check(first.steps >= 0, f"{name}.steps must not be negative")
        check(
            bool(first.image_size) == bool(first.steps),
            f"{name} needs both image_size and steps, or neither; they are {first.image_size} and {first.steps}",
        )
        check(
            first.image_size % unit == 0 and 0 <= first.image_size < whole,
            f"{name}.image_size={first.image_size} must be a multiple of {unit} below the model's {whole}",
        )

    model, data = config.model, config.data
    infinite = [
        name
        for name, value in flatten(config).items()
        if any(
            isinstance(one, float) and not math.isfinite(one) for one in (value if type(value) is tuple else [value])
        )
    ]
    if infinite:
        raise ValueError("\n".join(f"config.{name} must be a finite number" for name in infinite))
    problems += [
        *read_section(RunSettings, config).problems(),
        *read_section(DataSettings, data).problems(),
        *read_section(OptimizerSettings, config.optimizer).problems(),
        *read_section(MeshSettings, config.mesh).problems(),
        *read_section(EvaluationSettings, config.evaluation).problems(),
    ]
    for key in ("model.scan_unroll", "loss.block_size"):
        check(flatten(config)[key] >= 0, f"config.{key} must not be negative")
    check(model.dtype in DTYPES, f"config.model.dtype={model.dtype!r} must be one of {', '.join(DTYPES)}")
    check(
        model.remat in REMAT_POLICIES, f"config.model.remat={model.remat!r} must be one of {', '.join(REMAT_POLICIES)}"
    )
    check(
        config.loss.kind in LOSS_KINDS, f"config.loss.kind={config.loss.kind!r} must be one of {', '.join(LOSS_KINDS)}"
    )
    check(
        config.loss.form in LOSS_FORMS, f"config.loss.form={config.loss.form!r} must be one of {', '.join(LOSS_FORMS)}"
    )
    problems += read_section(Preprocessing, model.preprocessing).problems(model.vision.image_size)
    may_be_zero = ("scan_unroll", "preprocessing.resize_size", "preprocessing.fill_color")
    sizes = {name: value for name, value in flatten(model).items() if type(value) is int and name not in may_be_zero}
    too_small = [f"config.model.{name}={value} must be positive" for name, value in sizes.items() if value <= 0]
    problems.extend(too_small)
    if not too_small:
        vision, text = model.vision, model.text
        check(
            text.vocab_size >= VOCAB_SIZE,
            f"config.model.text.vocab_size={text.vocab_size} must be at least the tokenizer's {VOCAB_SIZE}",
        )
        check(text.context_length >= 2, "config.model.text.context_length must hold the two markers at least")
        check(0 <= model.patch_dropout < 1, f"config.model.patch_dropout={model.patch_dropout} must be in [0, 1)")
        if "stage_sizes" in vision:
            check_resnet(vision)
            check(
                not model.patch_dropout,
                "config.model.patch_dropout: a ResNet has no patches to leave out",
            )
        else:
            check(
                vision.image_size % vision.patch_size == 0,
                f"config.model.vision.patch_size={vision.patch_size} must divide image_size={vision.image_size}",
            )
            check_transformer("vision", vision)
        check_transformer("text", text)
        check_progressive_resolution("stage_sizes" in vision)
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
    # Keys missing from an older config take their defaults. Keys that no longer exist are ignored.
    defaults = flatten(ml_collections.ConfigDict(json.loads(to_json(default_config(config.model.name)))))
    before |= {name: defaults[name] for name in now.keys() & defaults.keys() if name not in before}
    different = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(now.keys() & before.keys())
        if now[name] != before[name] and name not in MAY_CHANGE
    ]
    if different:
        raise ValueError(f"{where} holds a run of another config ({'; '.join(different)}); choose another --workdir")
