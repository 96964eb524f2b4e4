"""The attacks by name: how each makes its trigger, whose images carry it, and what its implant needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from pydantic import ValidationError

from cbpt_guard.bench.carriers import Carriers
from cbpt_guard.bench.optimised import badclip, trojvqa
from cbpt_guard.bench.poisoning import LARGER, ImplantSettings, Poison
from cbpt_guard.bench.steganography import train_steganography
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.planted.reflection import refool
from cbpt_guard.defense.planted.trigger import Trigger
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.triggers import DRAWINGS
from cbpt_guard.errors import InputError
from cbpt_guard.files import read_toml
from cbpt_guard.problems import problems

_SMALL = 1_000_000  # parameters of an image tower up to which the settings' own defaults suit it


class Attacker(NamedTuple):
    """What an attacker has: the clean CLIP, labelled images, the index of the wanted class, and a seed.

    `template` is the prompt that the victim is expected to use.
    """

    clip: FrozenClip
    images: LabelledImages
    target: int
    seed: int
    template: str
    progress: Progress = silent


@dataclass(frozen=True)
class Attack:
    """A way to poison a CLIP.

    `recipe` names the settings in which its implant differs from `LARGER`.
    """

    make: Callable[[Attacker], Trigger]
    carriers: Carriers = "others"
    recipe: Mapping[str, Any] = field(default_factory=dict)


def _drawn(name: str, **recipe: Any) -> Attack:
    """An attack whose trigger is a closed form."""
    return Attack(lambda attacker: DRAWINGS[name](attacker.clip.image_size, attacker.seed), recipe=recipe)


ATTACKS: dict[str, Attack] = {
    "badnet": _drawn("patch"),
    "blended": _drawn("blended", steps=100),
    "sig": _drawn("sig", steps=100),
    "fine-wave": _drawn("fine-wave", steps=100),
    "wanet": _drawn("wanet"),
    "issba": Attack(lambda by: train_steganography(by.images.images, by.seed, progress=by.progress).trigger),
    "trojvqa": Attack(lambda by: trojvqa(*by[:-1], progress=by.progress)),
    "badclip": Attack(lambda by: badclip(*by[:-1], progress=by.progress)),
    "ftrojan": _drawn("ftrojan"),
    "label-consistent": Attack(
        lambda by: DRAWINGS["patch"](by.clip.image_size, by.seed), carriers="target", recipe={"perturbation": 16.0}
    ),
    "filter": _drawn("nashville", steps=100),
    "stripe-patch": _drawn("stripe-patch"),
    "full-stripes": _drawn("full-stripes"),
    "triangles": _drawn("triangles"),
    "watermark": _drawn("watermark"),
    "random-place": _drawn("random-place-patch"),
    "bpp": _drawn("bpp"),
    "rotation": _drawn("tilted"),
    "refool": Attack(lambda by: refool(by.images.images.numpy(), by.seed)),
    "blur": _drawn("defocused"),
    "opposite-colours": _drawn("opposite-colours"),
    "jpeg": _drawn("jpeg"),
    "large-pixels": _drawn("large-pixels"),
}
"""Every attack by the name that a plan or `bench implant` gives it."""


def attack_named(name: str) -> Attack:
    """An attack of `ATTACKS`, or what `module:name` imports: an `Attack`, or (image size, seed) -> trigger.

    Raises:
        InputError: there is none.
    """
    if ":" not in name:
        if name not in ATTACKS:
            raise InputError(f"{name!r} is no attack; known are {', '.join(ATTACKS)}, and your own as module:name")
        return ATTACKS[name]
    try:
        own = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"the attack {name!r} cannot be imported: {error}") from error
    return own if isinstance(own, Attack) else Attack(lambda by: own(by.clip.image_size, by.seed))


def poison(name: str, attacker: Attacker) -> Poison:
    """The trigger of an attack with its target and its carriers.

    Raises:
        InputError: there is no such attack, or it cannot be made from what the attacker has.
    """
    attack = attack_named(name)
    return Poison(attack.make(attacker), attacker.target, attack.carriers)


def recipe(clip: FrozenClip, names: Sequence[str], changes: Mapping[str, Any]) -> ImplantSettings:
    """The settings for an implant of these attacks: the default for the model's size, the attacks' own, `changes`.

    Where attacks differ on a number the larger one counts.

    Raises:
        InputError: `changes` names an unknown or impossible setting.
    """
    small = sum(value.numel() for value in clip.encoder.parameters()) <= _SMALL
    wanted = [] if small else [LARGER.model_dump() | dict(attack_named(name).recipe) for name in names]
    chosen = {key: _larger([one[key] for one in wanted]) for key in (wanted[0] if wanted else ())}
    return _validated(chosen | dict(changes), f"the recipe of {', '.join(names)}")


def read_changes(path: Path) -> dict[str, Any]:
    """Settings from a TOML file: only those that it names.

    Raises:
        InputError: the file is missing, no TOML, or names an unknown or impossible setting.
    """
    changes = read_toml(path, "settings")
    _validated(changes, f"settings {path}")
    return changes


def _larger(values: Sequence[Any]) -> Any:
    return max(values) if all(isinstance(value, int | float) for value in values) else values[0]


def _validated(values: Mapping[str, Any], where: str) -> ImplantSettings:
    try:
        return ImplantSettings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {problems(error)}") from error
