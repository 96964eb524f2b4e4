"""Which architecture a state dict fits: names and shapes, compared with models that hold no memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbpt_guard.defense import openclip
from cbpt_guard.defense.openclip import ModelConfig
from cbpt_guard.errors import CheckpointError, InputError

Shapes = dict[str, tuple[int, ...]]
_TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_UNKNOWN_TO_A_FILE = ("quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias")
_NEAREST = 3
_UNUSABLE = {
    "text_decoder.": "CoCa (a captioning decoder)",
    **dict.fromkeys(
        (f"text.transformer.{part}." for part in ("embeddings", "encoder", "decoder", "layers")),
        "a Hugging Face text tower",
    ),
}
"""What only an architecture that `openclip.refusal` names has in its state dict."""


class Difference(NamedTuple):
    """Names that a state dict lacks, has in another shape, or has and the architecture does not know."""

    missing: tuple[str, ...]
    misshaped: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every weight of the architecture is there in its shape."""
        return not self.missing and not self.misshaped

    def describe(self) -> str:
        """In words, at most four names of a kind."""
        parts = [_listed("missing", self.missing), _listed("of another shape", self.misshaped)]
        return "; ".join(part for part in (*parts, _listed("unknown", self.unknown)) if part)


class Fitted(NamedTuple):
    """A state dict that loads strictly, and what was changed for that."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of an architecture's state dict; nothing is allocated."""
    return {name: tuple(value.shape) for name, value in openclip.build(config).state_dict().items()}


def fit(tensors: Mapping[str, Tensor], config: ModelConfig) -> Fitted:
    """Make a state dict load strictly, as open_clip would: text layout, shape of scalars, missing logit bias.

    Raises:
        CheckpointError: a weight is missing or has another shape; none is ever made up.
    """
    wanted = shapes(config)
    difference = _compare({name: tuple(value.shape) for name, value in tensors.items()}, wanted)
    if not difference.fits:
        raise CheckpointError(
            f"the weights do not fit the architecture: {difference.describe()}; "
            "pass the right one as `--arch NAME|FILE`, or mend the open_clip_config.json beside the file"
        )
    by_plain_name = {_plain(name): value for name, value in tensors.items()}
    fitted: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, shape in wanted.items():
        if name == "logit_bias" and name not in by_plain_name:
            fitted[name] = torch.zeros(shape)
            notes.append("the file has no logit_bias: 0, as open_clip does")
        else:
            fitted[name] = by_plain_name[_plain(name)].reshape(shape)
    if difference.unknown:
        notes.append(f"dropped {_listed('unknown to the architecture', difference.unknown)}")
    return Fitted(fitted, tuple(notes))


def candidates(tensors: Mapping[str, Tensor]) -> dict[str, ModelConfig]:
    """open_clip's own configs that fit, by name; they differ only in what a file cannot tell.

    Raises:
        InputError: several fit that differ in more; they are listed.
        CheckpointError: none fits; the nearest is named with what is wrong.
    """
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    _check_kind(found)
    known = facts(found)
    if not {"text width", "vision"} <= set(known):
        raise CheckpointError(
            f"this is no CLIP: it lacks a text or a vision tower; it holds {_listed('names', tuple(found))}"
        )
    alike = {name: _agreement(known, config_facts(config)) for name, config in _usable_configs().items()}
    fits = {name: config for name, config in _usable_configs().items() if alike[name] == 1 and _exact(found, config)}
    if not fits:
        nearest = sorted(alike, key=lambda name: -alike[name])[:_NEAREST]
        raise CheckpointError(_no_fit(found, nearest))
    groups: dict[str, list[str]] = {}
    for name, config in fits.items():
        groups.setdefault(repr(_told_by_a_file(config)), []).append(name)
    if len(groups) > 1:
        listed = "; ".join(" = ".join(names) for names in groups.values())
        raise InputError(f"several architectures fit these weights ({listed}); name one with `--arch`")
    return fits


def _check_kind(found: Shapes) -> None:
    """Refuse what is a CLIP of a kind that cannot be used, by its name: no shape needs to be compared for that."""
    for prefix, kind in _UNUSABLE.items():
        name = next((name for name in found if name.startswith(prefix)), None)
        if name is not None:
            raise CheckpointError(f"this checkpoint cannot be used: {kind} is not supported; it holds {name}")


def _exact(found: Shapes, config: ModelConfig) -> bool:
    """A fit that leaves no weight of a tower unused: a leftover there belongs to another architecture."""
    difference = _compare(found, shapes(config))
    return difference.fits and not any(name.startswith(("visual.", *_TEXT_TOWER)) for name in difference.unknown)


def _no_fit(found: Shapes, names: list[str]) -> str:
    differences = {name: _compare(found, shapes(_usable_configs()[name])) for name in names}
    best = min(names, key=lambda name: sum(len(part) for part in differences[name]))
    return (
        f"no architecture of open_clip {openclip.VERSION} fits these weights. The nearest is {best}: "
        f"{differences[best].describe()}. If it is your own architecture, pass its config with `--arch FILE` "
        "or put open_clip_config.json beside the weights"
    )


def _compare(found: Shapes, wanted: Shapes) -> Difference:
    found = {_plain(name): shape for name, shape in found.items()}
    plain = {_plain(name): (name, shape) for name, shape in wanted.items()}
    missing = [name for key, (name, _) in plain.items() if key not in found and key != "logit_bias"]
    misshaped = [
        f"{name} {found[key]} instead of {shape}"
        for key, (name, shape) in plain.items()
        if key in found and not _same(key, found[key], shape)
    ]
    unknown = [key for key in found if key not in plain]
    return Difference(tuple(missing), tuple(misshaped), tuple(unknown))


def _same(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal shapes; the two scalars may be 0- or 1-dimensional."""
    return found == wanted or (name in ("logit_scale", "logit_bias") and {found, wanted} <= {(), (1,)})


def _plain(name: str) -> str:
    """A name without the `text.` that only newer models put before their text tower."""
    return name.removeprefix("text.")


def _listed(what: str, names: tuple[str, ...], most: int = 4) -> str:
    if not names:
        return ""
    return f"{what}: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


@cache
def _usable_configs() -> dict[str, ModelConfig]:
    named = {name: openclip.named_config(name) for name in openclip.architecture_names()}
    return {name: config for name, config in named.items() if openclip.refusal(config) is None}


def _told_by_a_file(config: ModelConfig) -> dict[str, Any]:
    """What is left of a config without activation and image size, which need not show in the shapes."""
    told = {name: value for name, value in sorted(config.items()) if name not in _UNKNOWN_TO_A_FILE}
    vision = {name: value for name, value in sorted(config["vision_cfg"].items()) if name != "image_size"}
    trunk = str(vision.get("timm_model_name") or "")
    vision["timm_model_name"] = trunk.rstrip("0123456789").rstrip("_") if trunk.rpartition("_")[2].isdigit() else trunk
    return {**told, "vision_cfg": vision, "text_cfg": dict(sorted(config["text_cfg"].items()))}


def facts(found: Shapes) -> dict[str, Any]:
    """Cheap features of a state dict that a config states too; unknown ones are absent."""
    found = {_plain(name): shape for name, shape in found.items()}
    projection = found.get("text_projection", ()) or found.get("text_projection.weight", ())[::-1]
    known: dict[str, Any] = {
        "text width": _at(found.get("token_embedding.weight"), 1),
        "vocabulary": _at(found.get("token_embedding.weight"), 0),
        "context": _at(found.get("positional_embedding"), 0),
        "text layers": _count(found, "transformer.resblocks."),
        "embedding": _at(projection, 1),
        "vision": _vision_kind(found),
    }
    if known["vision"] == "vit":
        known["vision width"] = _at(found.get("visual.conv1.weight"), 0)
        known["patch"] = _at(found.get("visual.conv1.weight"), -1)
        known["vision layers"] = _count(found, "visual.transformer.resblocks.")
    if known["vision"] == "resnet":
        known["vision layers"] = [_count(found, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {name: value for name, value in known.items() if value not in (None, 0)}


def config_facts(config: ModelConfig) -> dict[str, Any]:
    """The same features as a config states them, with open_clip's defaults."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    layers = vision.get("layers", 12)
    timm = bool(vision.get("timm_model_name"))
    return {
        "text width": text.get("width", 512),
        "vocabulary": text.get("vocab_size", 49408),
        "context": text.get("context_length", 77),
        "text layers": text.get("layers", 12),
        "embedding": config["embed_dim"],
        "vision": "timm" if timm else "resnet" if isinstance(layers, list) else "vit",
        "vision width": vision.get("width", 768),
        "patch": vision.get("patch_size", 16),
        "vision layers": layers,
    }


def _agreement(known: Mapping[str, Any], stated: Mapping[str, Any]) -> float:
    """Share of the known features that a config states alike."""
    alike = [bool(stated[name] == value) for name, value in known.items()]
    return sum(alike) / max(1, len(alike))


def _vision_kind(found: Shapes) -> str | None:
    for prefix, kind in (
        ("visual.trunk.", "timm"),
        ("visual.layer1.", "resnet"),
        ("visual.transformer.", "vit"),
    ):
        if any(name.startswith(prefix) for name in found):
            return kind
    return None


def _at(shape: tuple[int, ...] | None, index: int) -> int | None:
    return shape[index] if shape is not None and len(shape) > max(index, 0) else None


def _count(found: Shapes, prefix: str) -> int:
    """How many numbered modules stand under a prefix."""
    return len({name[len(prefix) :].partition(".")[0] for name in found if name.startswith(prefix)})
