"""The config of a run: its defaults, config files, overrides, and all checks that need no device.

A file in ``configs/`` returns :func:`default_config` of a preset with some values changed. The config is locked: an
unknown key is an error.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator

import ml_collections

from clip_jax import losses
from clip_jax.data.settings import DataSettings
from clip_jax.data.tokenizer import VOCAB_SIZE
from clip_jax.errors import one_line
from clip_jax.evaluation.settings import EvaluationSettings
from clip_jax.models.presets import CLIPPreset, ModelSettings, get_preset, model_preset, preset_from_dict
from clip_jax.models.presets import problems as model_problems
from clip_jax.models.towers.base import ImageTower
from clip_jax.settings import (
    changeable,
    may_change,
    must_be,
    must_be_positive,
    must_not_be_negative,
    read_section,
)
from clip_jax.sharding import MeshSettings
from clip_jax.training.optimizer import OptimizerSettings
from clip_jax.training.wandb_log import LoggingSettings


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Defaults of the keys outside sections: those of the paper's training (tables 18 to 20)."""

    seed: int = 0
    # A run or weights to start from; the positional embedding is resized for another image size. It is ignored if the
    # run already has a checkpoint.
    init_from: str = may_change("")
    global_batch_size: int = 32_768  # pairs in a step, over all devices
    accumulation_steps: int = may_change(1)  # parts of a batch, of which one has activations in memory
    epochs: float = 32.0  # passes over the source
    steps: int = 0  # length of the training and its schedule; 0: by epochs
    log_every: int = may_change(10)  # steps
    eval_every: int = may_change(0)  # steps; 0: only at the end
    checkpoint_every: int = may_change(1_000)  # steps; the last step is always saved
    checkpoint_minutes: float = may_change(0.0)  # also saves the first logged step after so long; 0: only by steps
    checkpoints_to_keep: int = may_change(3)  # the newest
    keep_every: int = may_change(0)  # steps; checkpoints at its multiples are kept for good; 0: none
    stall_minutes: float = may_change(30.0)  # without progress, after which the training ends; 0: never

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
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
            *must_not_be_negative(self, ("eval_every", "checkpoint_minutes", "stall_minutes", "keep_every"), "config"),
            *must_be(
                self.checkpoint_every <= 0 or self.keep_every % self.checkpoint_every == 0,
                f"config.keep_every={self.keep_every} must be a multiple of config.checkpoint_every="
                f"{self.checkpoint_every}: other steps are not saved",
            ),
        ]


@dataclasses.dataclass(frozen=True)
class ProgressiveResolutionSettings:
    """Defaults of ``config.progressive_resolution``: all steps have the model's image size."""

    image_size: int = 0  # pixels, of the images of the first steps
    steps: int = 0  # number of first steps

    def problems(self, vision: ImageTower) -> list[str]:
        """Returns one line for each value that is invalid for this image tower."""
        name, unit = "config.progressive_resolution", vision.side_unit
        return [
            *must_be(self.steps >= 0, f"{name}.steps must not be negative"),
            *must_be(
                bool(self.image_size) == bool(self.steps),
                f"{name} needs both image_size and steps, or neither; they are {self.image_size} and {self.steps}",
            ),
            *must_be(
                self.image_size % unit == 0 and 0 <= self.image_size < vision.image_size,
                f"{name}.image_size={self.image_size} must be a multiple of {unit} below the model's "
                f"{vision.image_size}",
            ),
        ]


SECTIONS = {
    "model": ModelSettings,  # and the fields of the preset
    "optimizer": OptimizerSettings,
    "mesh": MeshSettings,
    "progressive_resolution": ProgressiveResolutionSettings,
    "data": DataSettings,
    "evaluation": EvaluationSettings,
    "logging": LoggingSettings,
}
MAY_CHANGE = {
    *changeable(RunSettings),
    *(f"{section}.{name}" for section, settings in SECTIONS.items() for name in changeable(settings)),
}


def default_config(preset: str | CLIPPreset) -> ml_collections.ConfigDict:
    """Returns the paper's training of this preset (tables 18 to 20), without data and evaluation.

    Args:
      preset: its name in :data:`clip_jax.models.presets.PRESETS`, or your own preset, with the name "custom".

    Raises:
      ValueError: the preset is unknown.
    """
    name, preset = (preset, get_preset(preset)) if isinstance(preset, str) else ("custom", preset)
    config = ml_collections.ConfigDict(dataclasses.asdict(RunSettings()))
    for section, settings in SECTIONS.items():
        config[section] = ml_collections.ConfigDict(dataclasses.asdict(settings()))
    config.model.update(dataclasses.asdict(preset), name=name)
    config.optimizer.update(preset.vision.optimizer_defaults)
    config.loss = losses.default_section()  # kind, "softmax", and each loss's keys: see the classes in clip_jax.losses
    config.lock()
    return config


def load_config_file(path: str) -> ml_collections.ConfigDict:
    """Returns the result of a config file's ``get_config``. ``configs/NAME.py`` or NAME may be a packaged config.

    Raises:
      FileNotFoundError: there is no such file; the message lists the packaged ones.
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
    except Exception as error:  # the file's code may raise any type
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
    """Returns all leaves by dotted name: ``{"data.source": ..., ...}``."""
    return dict(_leaves(config))


def _whole_number(text: str) -> int:
    """Reads ``512``, ``1_000`` and ``5e8``. Raises ValueError for other texts."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise ValueError(f"{text} is not a whole number") from None
        return int(number)


# How the text of a value is read, and what it must be.
_TYPES: dict[type, tuple[Callable[[str], object], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (_whole_number, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
}


def _nearest_key(name: str, keys: Collection[str]) -> str:
    """Returns the key that was probably meant: by its last word, by its initials (``lr``), or the most similar."""
    last = name.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    short = [key for key in keys if "".join(word[0] for word in key.rpartition(".")[2].split("_")) == last]
    return difflib.get_close_matches(name, same or short or keys, n=1, cutoff=0.0)[0]


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets the leaf of this dotted name from text, converted to the type of the leaf.

    Raises:
      ValueError: there is no such leaf (the message names a similar one), or the text is not of its type.
    """
    leaves = flatten(config)
    if name not in leaves:
        raise ValueError(f"--config.{name}: there is no such key; did you mean --config.{_nearest_key(name, leaves)}?")
    default = leaves[name]
    if default is None:
        raise ValueError(f"config.{name} has no value in the config file, so no type; default_config(...) gives it one")
    several = isinstance(default, tuple)
    read, wanted = _TYPES[type(default[0] if several else default)]
    try:
        value = tuple(map(read, text.strip("()[]").split(","))) if several else read(text)
    except (ValueError, KeyError):
        raise ValueError(f"--config.{name}={text}: must be {wanted}{', ...' * several}") from None
    *parents, key = name.split(".")
    for parent in parents:
        config = config[parent]
    config[key] = value


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks everything that needs no data and no devices, and reports all mistakes together.

    Raises:
      ValueError: one line for each mistake: which key, what is wrong, how to fix it.
    """
    if without_value := _keys_without_value(config):
        raise ValueError(
            "\n".join(f"config.{name} has no value; default_config(...) gives each key one" for name in without_value)
        )
    infinite = [name for name, value in flatten(config).items() if not _is_finite(value)]
    if infinite:
        raise ValueError("\n".join(f"config.{name} must be a finite number" for name in infinite))
    problems = [
        *read_section(RunSettings, config).problems(),
        *(
            problem
            for name, section in SECTIONS.items()
            if name not in ("model", "progressive_resolution")  # their checks need both towers
            for problem in read_section(section, config[name]).problems()
        ),
        *losses.problems(config.loss),
        *_model_problems(config),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _keys_without_value(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the keys that are None, or that a config file has deleted."""
    given = flatten(config)
    towers = ("model.vision", "model.text")  # have keys of their own
    expected = [name for name in flatten(default_config("ViT-B/32")) if not name.startswith(towers)]
    missing = [name for name in expected if name not in given]
    missing += [name for name in towers if not any(key.startswith(f"{name}.") for key in given)]
    return [*missing, *(name for name, value in given.items() if value is None and name not in missing)]


def _is_finite(value: object) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _model_problems(config: ml_collections.ConfigDict) -> list[str]:
    """Returns mistakes in the model, in its vocabulary for the tokenizer, and in ``config.progressive_resolution``."""
    problems = model_problems(config.model)
    has_towers = not any(problem.startswith(("config.model.vision", "config.model.text")) for problem in problems)
    vocab_size = config.model.text.get("vocab_size", VOCAB_SIZE)
    problems += must_be(
        vocab_size >= VOCAB_SIZE,
        f"config.model.text.vocab_size={vocab_size} must be at least the tokenizer's {VOCAB_SIZE}",
    )
    if has_towers:
        first = read_section(ProgressiveResolutionSettings, config.progressive_resolution)
        problems += first.problems(model_preset(config).vision)
    return problems


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


# Keys that --allow-changed refuses, and why. Of the model's keys, only those of ModelSettings can change.
FIXED = {
    "seed": "the order of the data and the first parameters follow from it",
    "loss.kind": "each loss has parameters of its own",
    "optimizer.first_moment_dtype": "the saved moments have this dtype",
}
MODEL_REASON = "it describes the model; start a new run from these weights, with config.init_from"


def check_allowed(names: Collection[str]) -> None:
    """Checks the keys of ``--allow-changed``.

    Raises:
      ValueError: there is no such key, or the saved state does not fit another value of it; one line.
    """
    known = [*flatten(default_config("ViT-B/32"))]
    for name in names:
        if why := _why_fixed(name):
            raise ValueError(f"--allow-changed={name}: it cannot change: {why}")
        if name not in known:
            raise ValueError(f"--allow-changed={name}: there is no such key; did you mean {_nearest_key(name, known)}?")


def _why_fixed(name: str) -> str:
    """Returns why this key cannot change within a run, or an empty text."""
    if name.startswith("model.") and name.partition(".")[2] not in {f.name for f in dataclasses.fields(ModelSettings)}:
        return MODEL_REASON
    return FIXED.get(name, "")


def check_same_run(
    config: ml_collections.ConfigDict, saved: dict, where: str, allowed: Collection[str] = ()
) -> dict[str, list]:
    """Checks that ``saved`` is the config of the same run.

    Returns:
      The keys of ``allowed`` that differ, with the old and the new value.

    Raises:
      ValueError: other keys differ that a resumed run may not change; the message lists them with both values.
    """
    if "converted_from" in saved:
        raise ValueError(
            f"{where} holds weights converted from {saved['converted_from']}, not a run; start from them with "
            f"--config.init_from={where} and another --workdir"
        )
    now = flatten(ml_collections.ConfigDict(json.loads(to_json(config))))  # JSON has no tuples
    before = flatten(ml_collections.ConfigDict(saved))
    # Keys missing from an older config take their defaults. Keys that no longer exist outside the model are ignored.
    try:
        default = default_config(preset_from_dict(saved["model"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{where} holds a run of an unknown model ({reason}); choose another --workdir") from None
    defaults = flatten(ml_collections.ConfigDict(json.loads(to_json(default))))
    before |= {name: defaults[name] for name in now.keys() & defaults.keys() if name not in before}
    may_change = MAY_CHANGE | {f"loss.{key}" for key in losses.keys_that_may_change()}
    changed = {
        name: [before[name], now[name]]
        for name in sorted(now.keys() & before.keys())
        if now[name] != before[name] and name not in may_change
    }
    if different := sorted(changed.keys() - set(allowed)):
        values = "; ".join(f"{name} was {changed[name][0]!r} and is {changed[name][1]!r}" for name in different)
        can_change = not any(map(_why_fixed, different))
        way_out = f", or go on with the new values: --allow-changed={','.join(different)}" if can_change else ""
        raise ValueError(f"{where} holds a run of another config ({values}); choose another --workdir{way_out}")
    return changed
