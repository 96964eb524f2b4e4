"""Every planted trigger: the kinds by name, how each attack draws its own, and `trigger.json` on disk.

A trigger is a frozen value that acts on uint8 pixels. Its kind lives in a module of its own, with the functions
that draw one from an image size and a seed; sizes are the literature's at 224 pixels, scaled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from cbpt_guard.defense.planted.blur import Blur, defocused
from cbpt_guard.defense.planted.compression import Compression, jpeg
from cbpt_guard.defense.planted.filter import Filter, nashville
from cbpt_guard.defense.planted.frequency import Frequency, ftrojan
from cbpt_guard.defense.planted.overlay import Overlay, blended, full_stripes, triangles, watermark
from cbpt_guard.defense.planted.patch import Patch, RandomPlacePatch, patch, random_place_patch, stripe_patch
from cbpt_guard.defense.planted.pixelation import Pixelation, large_pixels
from cbpt_guard.defense.planted.quantised import Quantised, bpp
from cbpt_guard.defense.planted.reflection import Reflection
from cbpt_guard.defense.planted.rotation import Rotation, tilted
from cbpt_guard.defense.planted.saturation import Saturation, opposite_colours
from cbpt_guard.defense.planted.steganographic import Steganographic
from cbpt_guard.defense.planted.trigger import LARGEST_SIDE, Trigger, TriggerParams
from cbpt_guard.defense.planted.warp import Warp, wanet
from cbpt_guard.defense.planted.wave import Wave, fine_wave, sig
from cbpt_guard.errors import InputError
from cbpt_guard.files import write_text
from cbpt_guard.problems import problems

__all__ = [
    "DRAWINGS",
    "TRIGGERS",
    "Patch",
    "PlantedTrigger",
    "Trigger",
    "load_trigger",
    "patch",
    "save_trigger",
]

FORMAT = 1
JSON_NAME = "trigger.json"
_LARGEST_JSON = 1 << 16

TRIGGERS: dict[str, type[Trigger]] = {
    "patch": Patch,
    "random-place-patch": RandomPlacePatch,
    "overlay": Overlay,
    "wave": Wave,
    "warp": Warp,
    "frequency": Frequency,
    "filter": Filter,
    "steganographic": Steganographic,
    "quantised": Quantised,
    "rotation": Rotation,
    "reflection": Reflection,
    "blur": Blur,
    "saturation": Saturation,
    "compression": Compression,
    "pixelation": Pixelation,
}
"""Every kind of trigger by the name that stands in `trigger.json`."""

DRAWINGS: dict[str, Callable[[int, int], Trigger]] = {
    "patch": patch,
    "random-place-patch": random_place_patch,
    "stripe-patch": stripe_patch,
    "blended": blended,
    "full-stripes": full_stripes,
    "triangles": triangles,
    "watermark": watermark,
    "sig": sig,
    "fine-wave": fine_wave,
    "wanet": wanet,
    "ftrojan": ftrojan,
    "nashville": nashville,
    "bpp": bpp,
    "tilted": tilted,
    "defocused": defocused,
    "opposite-colours": opposite_colours,
    "jpeg": jpeg,
    "large-pixels": large_pixels,
}
"""Every closed-form trigger by the attack's name: (image size, seed) -> trigger."""


class PlantedTrigger(NamedTuple):
    """A trigger and the name of the class that it was planted toward."""

    trigger: Trigger
    target: str


class _TriggerFile(TriggerParams):
    format: Literal[1]
    kind: str
    target: Annotated[str, Field(min_length=1, max_length=1000)]
    image_size: Annotated[int, Field(ge=16, le=LARGEST_SIDE)]
    params: dict[str, Any]


def save_trigger(trigger: Trigger, target: str, folder: Path) -> Path:
    """Write `trigger.json` and what lies beside it into an existing folder; returns the JSON's path."""
    content = {"format": FORMAT, "kind": trigger.kind, "target": target, "image_size": trigger.image_size}
    trigger.write(folder)
    write_text(folder / JSON_NAME, json.dumps({**content, "params": trigger.params()}, indent=1))
    return folder / JSON_NAME


def load_trigger(path: Path) -> PlantedTrigger:
    """Read a `trigger.json`, or the one in a folder.

    Raises:
        InputError: missing, malformed, of an unknown kind, or its picture does not fit.
    """
    path = path / JSON_NAME if path.is_dir() else path
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"trigger {path} is larger than {_LARGEST_JSON // 1024} KiB: no trigger file is")
        read = _TriggerFile.model_validate_json(path.read_bytes())
        if read.kind not in TRIGGERS:
            raise InputError(f"trigger {path} is of kind {read.kind!r}; known are {', '.join(TRIGGERS)}")
        trigger = TRIGGERS[read.kind].restore(read.params, read.image_size, path.parent)
    except OSError as error:
        raise InputError(f"trigger {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise InputError(f"trigger {path} is malformed: {problems(error, 'JSON')}") from error
    return PlantedTrigger(trigger, read.target)
