"""Journal: the finished parts of a run, kept so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.errors import InputError
from cbpt_guard.files import write_text

FOLDER = "journal"
_KEY = "key.json"


class Parts(Protocol):
    """Where parts of a search are made once: a `Journal`, or `Scratch`."""

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made once."""

    def trigger(self, name: str, make: Callable[[], FoundTrigger]) -> FoundTrigger:
        """The found trigger of that name, made once."""


class Scratch:
    """Parts in memory, for what is looked at once and not gone on with."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._triggers: dict[str, FoundTrigger] = {}

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made once."""
        if name not in self._tensors:
            self._tensors[name] = make()
        return self._tensors[name]

    def trigger(self, name: str, make: Callable[[], FoundTrigger]) -> FoundTrigger:
        """The found trigger of that name, made once."""
        if name not in self._triggers:
            self._triggers[name] = make()
        return self._triggers[name]


class Journal:
    """Parts by name in one folder; a part that is there is read, one that is not is made and written.

    Args:
        folder: the run's unfinished directory.
        key: everything that the parts depend on.

    Raises:
        InputError: the folder holds the parts of another job.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir(exist_ok=True)
        path, text = self._folder / _KEY, json.dumps(key, sort_keys=True)
        if not path.exists():  # whoever was stopped while removing parts may have left some that nobody can tell
            shutil.rmtree(self._folder)
            self._folder.mkdir()
        elif path.read_bytes() != text.encode():
            raise InputError(f"{folder} was begun with {_difference(path, key)}; start over without `--resume`")
        write_text(path, text)

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made once."""
        path = self._folder / f"{name}.safetensors"
        if path.exists():
            return _load(path)
        made = make()
        self._keep(path, lambda temporary: save_file({"tensor": made.contiguous()}, temporary))
        return made

    def trigger(self, name: str, make: Callable[[], FoundTrigger]) -> FoundTrigger:
        """The found trigger of that name, made once."""
        path = self._folder / f"{name}.safetensors"
        if path.exists():
            return TriggerBank.load(path).triggers[0]
        made = make()
        self._keep(path, TriggerBank((made,)).save)
        return made

    def remove(self) -> None:
        """Forget every part: the run is complete."""
        shutil.rmtree(self._folder)

    @staticmethod
    def _keep(path: Path, save: Callable[[Path], None]) -> None:
        temporary = path.with_suffix(".new")
        save(temporary)
        temporary.replace(path)


def _load(path: Path) -> Tensor:
    try:
        return load_file(path)["tensor"]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); start over without `--resume`") from error


def _difference(path: Path, key: Mapping[str, Any]) -> str:
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return "a key that cannot be read any more"
    now = json.loads(json.dumps(key))
    return "another " + ", ".join(sorted(name for name in now if before.get(name) != now[name]) or ["format"])
