"""What the suspect is: architecture and all that a file cannot tell, resolved by one rule or not at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from cbpt_guard.defense import matching, modelconfig, openclip
from cbpt_guard.defense.modelconfig import PREPROCESSING
from cbpt_guard.defense.openclip import ModelConfig
from cbpt_guard.defense.untrusted.checkpoint import CONFIG_NAME, ReadCheckpoint
from cbpt_guard.errors import InputError
from cbpt_guard.images import Preprocess

BESIDE = f"{CONFIG_NAME} beside the file"
OPEN_CLIP_TOKENIZER = "open_clip"
_OPEN_CLIP_VOCABULARY = 49408
_TRIED = ("openai", "siglip", "half", "mobileclip")
_STANDARD_ERRORS = 2.0
_TWIN = "-quickgelu"


class Accuracy(NamedTuple):
    """Zero-shot accuracy in [0, 1] on N clean images."""

    value: float
    images: int

    @property
    def variance(self) -> float:
        """Of the mean, with one success and one failure added so that few images never look certain."""
        smoothed = (self.value * self.images + 1) / (self.images + 2)
        return smoothed * (1 - smoothed) / max(1, self.images)


class ModelSpec(BaseModel):
    """A model as it will be built.

    `config` is open_clip's `model_cfg` with `quick_gelu` and image size settled. `tokenizer` is "open_clip"
    or the folder of a Hugging Face tokenizer. `resolved` tells how "architecture", "quickgelu", "preprocess"
    and "tokenizer" were found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    config: dict[str, Any]
    preprocess: Preprocess
    quickgelu: bool
    tokenizer: str
    resolved: dict[str, str]


Judge = Callable[[ModelSpec], Accuracy]


@dataclass(frozen=True)
class _Options:
    """Values still possible for one quantity, how a single one was found, and the flag to settle it."""

    values: Sequence[Any]
    how: str
    flag: str
    names: Sequence[str] = field(default_factory=tuple)

    @property
    def open(self) -> bool:
        return len(self.values) > 1


class _Architecture(NamedTuple):
    """Configs by name that are one fit, their origin, and whether that origin speaks of the activation."""

    models: dict[str, ModelConfig]
    how: str
    states_activation: bool


def resolve_model(
    checkpoint: ReadCheckpoint,
    *,
    arch: str | None = None,
    quickgelu: bool | None = None,
    preprocess: str | None = None,
    tokenizer: Path | None = None,
    judge: Judge | None = None,
) -> ModelSpec:
    """Settle architecture and what a file cannot tell: by flag, else config beside the file, else accuracy.

    Args:
        checkpoint: what was read.
        arch: a name of open_clip's, or a JSON file with a `model_cfg`.
        quickgelu: whether the towers use QuickGELU.
        preprocess: a name in `PREPROCESSING`, or a JSON file with the fields of `Preprocess`.
        tokenizer: a folder with a Hugging Face tokenizer.
        judge: zero-shot accuracy of a spec on clean data; one alternative must lead by two standard errors.

    Raises:
        CheckpointError: the weights fit no architecture, or not the one that was named.
        InputError: something stays open, or a flag is of no use; the flag to set is named.
    """
    architecture = _architecture(checkpoint, arch)
    config = next(iter(architecture.models.values()))
    matching.fit(checkpoint.tensors, config)
    settled = {"architecture": architecture.how, "tokenizer": _tokenizer_rule(config, tokenizer)}
    options = {
        "architecture": _image_sizes(architecture),
        "quickgelu": _activations(checkpoint, architecture, quickgelu),
        "preprocess": _preprocessings(checkpoint, preprocess),
    }
    specs = {
        choice: _spec(architecture.models, dict(zip(options, choice, strict=True)), options, settled, tokenizer)
        for choice in itertools.product(*(range(len(option.values)) for option in options.values()))
    }
    unsettled = {name: option for name, option in options.items() if option.open}
    if not unsettled:
        return next(iter(specs.values()))
    if judge is None:
        raise InputError(_stop(unsettled))
    return _judged(specs, options, judge)


def _architecture(checkpoint: ReadCheckpoint, arch: str | None) -> _Architecture:
    if arch is None and checkpoint.folder_config is not None:
        config = modelconfig.checked_model(checkpoint.folder_config["model_cfg"])
        return _Architecture({_title(config): config}, BESIDE, states_activation=True)
    if arch is None:
        how = f"inferred: the only fit among the configs of open_clip {openclip.VERSION}"
        return _Architecture(matching.candidates(checkpoint.tensors), how, states_activation=False)
    config, named = _asked_for(arch)
    if named:
        return _Architecture({arch: config}, "--arch", states_activation=arch.endswith(_TWIN))
    return _Architecture({_title(config): config}, f"--arch {Path(arch).name}", states_activation=True)


def _asked_for(arch: str) -> tuple[ModelConfig, bool]:
    """The config that `--arch` means, and whether it is one of open_clip's names."""
    if arch in openclip.architecture_names() or not (Path(arch).suffix or Path(arch).exists()):
        return modelconfig.checked_model(openclip.named_config(arch), arch), True
    return modelconfig.checked_model(modelconfig.read_config(Path(arch))["model_cfg"], Path(arch).name), False


def check_arch(arch: str | None) -> None:
    """Refuse an `--arch` that cannot be used by its name, before the weights are read.

    Raises:
        CheckpointError: the architecture is not supported, or its numbers are of another world.
        InputError: there is none of that name, or its file is malformed.
    """
    if arch is not None:
        _asked_for(arch)


def _title(config: ModelConfig) -> str:
    return f"custom {config['vision_cfg'].get('timm_model_name') or 'CLIP'}"


def _image_sizes(architecture: _Architecture) -> _Options:
    models = architecture.models
    sizes = sorted({modelconfig.image_size(config) for config in models.values()})
    return _Options(sizes, architecture.how, f"`--arch` ({', '.join(models)})", [f"{size} px" for size in sizes])


def _activations(checkpoint: ReadCheckpoint, architecture: _Architecture, flag: bool | None) -> _Options:
    settle = "`--quickgelu` or `--no-quickgelu`"
    stated = sorted({_uses_quickgelu(config) for config in architecture.models.values()})
    if flag is not None:
        return _Options([flag], "--quickgelu" if flag else "--no-quickgelu", settle)
    if architecture.states_activation:
        return _Options(stated, architecture.how, settle)
    if checkpoint.folder_config is not None:
        return _Options([_uses_quickgelu(checkpoint.folder_config["model_cfg"])], BESIDE, settle)
    if checkpoint.quickgelu is not None:
        return _Options([checkpoint.quickgelu], "the activation's class in the TorchScript archive", settle)
    name = next(iter(architecture.models))
    if len(stated) > 1 or f"{name}{_TWIN}" in openclip.architecture_names():
        return _Options([False, True], "", settle, ["GELU", "QuickGELU"])
    return _Options(stated, f"open_clip has no other config of this shape than {name}", settle)


def _uses_quickgelu(config: ModelConfig) -> bool:
    return bool(config.get("quick_gelu", False))


def _preprocessings(checkpoint: ReadCheckpoint, flag: str | None) -> _Options:
    """Functions of the image size that give a `Preprocess`."""
    settle = f"`--preprocess` (a JSON file, or one of {', '.join(PREPROCESSING)})"
    if flag is not None and flag in PREPROCESSING:
        return _Options([PREPROCESSING[flag]], f"--preprocess {flag}", settle)
    if flag is not None:
        if not Path(flag).is_file():
            raise InputError(f"--preprocess {flag} is neither a file nor one of {', '.join(PREPROCESSING)}")
        return _Options([modelconfig.read_json(Path(flag))], f"--preprocess {Path(flag).name}", settle)
    beside = modelconfig.preprocess_fields((checkpoint.folder_config or {}).get("preprocess_cfg") or {})
    if beside is not None:
        partial = "" if {"resize_mode", "interpolation"} <= set(beside) else ", open_clip's defaults for the rest"
        return _Options([beside], BESIDE + partial, settle)
    return _Options([PREPROCESSING[name] for name in _TRIED], "", settle, _TRIED)


def _tokenizer_rule(config: ModelConfig, folder: Path | None) -> str:
    text = config["text_cfg"]
    if folder is not None:
        return f"--tokenizer {folder.name}"
    foreign = text.get("hf_tokenizer_name")
    if foreign or text.get("vocab_size", _OPEN_CLIP_VOCABULARY) != _OPEN_CLIP_VOCABULARY:
        reason = (
            f"uses {foreign}" if foreign else f"has {text['vocab_size']} words, open_clip's own {_OPEN_CLIP_VOCABULARY}"
        )
        raise InputError(f"this model's tokenizer {reason}: put its files into a folder and pass `--tokenizer FOLDER`")
    return "open_clip's byte pairs: the vocabulary has their size and the config names no other"


def _spec(
    models: dict[str, ModelConfig],
    choice: dict[str, int],
    options: dict[str, _Options],
    settled: dict[str, str],
    tokenizer: Path | None,
) -> ModelSpec:
    size, quickgelu, fields = (
        options[name].values[choice[name]] for name in ("architecture", "quickgelu", "preprocess")
    )
    of_size = {name: config for name, config in models.items() if modelconfig.image_size(config) == size}
    exact = [name for name, config in of_size.items() if _uses_quickgelu(config) == quickgelu]
    name = (exact or list(of_size))[0]
    return ModelSpec(
        architecture=name,
        config={**of_size[name], "quick_gelu": quickgelu},
        preprocess=modelconfig.build_preprocess(fields, size),
        quickgelu=quickgelu,
        tokenizer=OPEN_CLIP_TOKENIZER if tokenizer is None else str(tokenizer.absolute()),
        resolved={**settled, "quickgelu": options["quickgelu"].how, "preprocess": options["preprocess"].how},
    )


def _judged(specs: dict[tuple[int, ...], ModelSpec], options: dict[str, _Options], judge: Judge) -> ModelSpec:
    """The most accurate spec, if each open quantity's value leads every other by two standard errors."""
    scores = {choice: judge(spec) for choice, spec in specs.items()}
    best = max(scores, key=lambda choice: scores[choice].value)
    resolved = dict(specs[best].resolved)
    undecided: dict[str, _Options] = {}
    for axis, (name, option) in enumerate(options.items()):
        if not option.open:
            continue
        tops = [
            max((scores[choice] for choice in scores if choice[axis] == value), key=lambda score: score.value)
            for value in range(len(option.values))
        ]
        how = "clean accuracy: " + ", ".join(
            f"{label} {100 * score.value:.1f} %" for label, score in zip(option.names, tops, strict=True)
        )
        resolved[name] = f"{resolved[name]}; {how}" if resolved[name] else how
        if not all(_leads(tops[best[axis]], top) for value, top in enumerate(tops) if value != best[axis]):
            undecided[name] = _Options(option.values, how, option.flag, option.names)
    if undecided:
        raise InputError(_stop(undecided))
    return specs[best].model_copy(update={"resolved": resolved})


def _leads(first: Accuracy, second: Accuracy) -> bool:
    return first.value - second.value > _STANDARD_ERRORS * math.sqrt(first.variance + second.variance)


def _stop(undecided: dict[str, _Options]) -> str:
    lines = [
        f"{name} ({', '.join(option.names)}): set {option.flag}" + (f"; {option.how}" if option.how else "")
        for name, option in undecided.items()
    ]
    return "the file does not tell, and nothing else settles: " + "; ".join(lines)
