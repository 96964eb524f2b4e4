"""The suite's plan: which implants meet which defences, read from TOML, split into shards, priced in hours."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cbpt_guard.bench.lines import CONTROL, OFF, Key
from cbpt_guard.bench.settings import SETTINGS, settings_of
from cbpt_guard.defense.settings import TEMPLATE
from cbpt_guard.errors import InputError
from cbpt_guard.files import read_toml
from cbpt_guard.problems import problems

_SHORT = 16
Split = Literal["clean", "test"]
_Names = Annotated[tuple[str, ...], Field(min_length=1)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}$")]
_Seed = Annotated[int, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
_Minutes = dict[str, Annotated[float, Field(ge=0)]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(_Frozen):
    """A clean CLIP and class folders, relative to the roots that the command line names.

    `train` is the attacker's; the shots are drawn from `clean`, and development counts on the rest of it; `test` is
    read by `--final` alone.
    """

    model: str
    train: str
    clean: str
    test: str


class Implant(_Frozen):
    """A poisoned copy of a data set's CLIP: attacks with the class that each aims at, and how they are planted.

    An attack is a name of `ATTACKS`, or `module:name` of one's own. With `folder` the implant is taken from there (in
    a root) instead of being planted: `suspect.pt`, its config, and `trigger.json` or sub-folders that hold one.
    """

    dataset: str
    attacks: Annotated[dict[str, str], Field(min_length=1)]
    seed: _Seed = 0
    recipe: dict[str, Any] = {}
    folder: str | None = None

    @property
    def attack(self) -> str:
        """The name that its lines bear."""
        return "+".join(self.attacks)


class Cells(_Frozen):
    """Every combination of the lists.

    A defence is a name of `DEFENSES`, or `module:name` of one's own. With `control` the defences get the clean model,
    and the implants give the triggers alone; those that `off` names are also counted with the triggers switched off.
    `final_only`: the shots leave no image to count in development.
    """

    implants: _Names
    defenses: _Names
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1)] = (0,)
    shots: Annotated[tuple[_Count, ...], Field(min_length=1)] = (16,)
    control: bool = False
    off: tuple[str, ...] = ()
    final_only: bool = False
    minutes: _Minutes = {}


class Group(_Frozen):
    """One defence of one suspect with one draw of shots, and the implants whose triggers are counted on it.

    `suspect` is the implant's name, or the data set's where its clean model is defended (`control`).
    """

    suspect: str
    dataset: str
    control: bool
    implants: tuple[str, ...]
    off: bool
    final_only: bool
    defense: str
    seed: int
    shots: int
    minutes: float

    @property
    def unit(self) -> str:
        """What one shard must have to itself."""
        return f"clean {self.suspect}" if self.control else self.suspect


class Places(NamedTuple):
    """Where things lie on this machine: `roots` are searched for the plan's paths, `work` keeps what is made."""

    roots: tuple[Path, ...]
    work: Path

    def find(self, relative: str) -> Path:
        """The plan's path in the first root that has it; `InputError` where none has."""
        for root in self.roots:
            if (root / relative).exists():
                return root / relative
        raise InputError(f"none of the roots {', '.join(map(str, self.roots))} has {relative}; name one with `--root`")


class Plan(_Frozen):
    """A whole suite.

    `minutes` states what an `implant`, an implant's `trigger` alone, and each defence are expected to take on two
    cores, two at a time.
    """

    template: str = TEMPLATE
    datasets: dict[_Name, Dataset]
    implants: dict[_Name, Implant]
    cells: Annotated[tuple[Cells, ...], Field(min_length=1)]
    minutes: _Minutes = {}

    @classmethod
    def read(cls, path: Path) -> Plan:
        """A plan from a TOML file.

        Raises:
            InputError: the file is missing, no TOML, or does not fit together.
        """
        try:
            return cls.model_validate(read_toml(path, "plan"))
        except ValidationError as error:
            raise InputError(f"plan {path}: {problems(error, 'plan')}") from error

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, implant in self.implants.items():
            if implant.dataset not in self.datasets:
                raise ValueError(f"implant {name!r} is of the data set {implant.dataset!r}, which the plan lacks")
        for cells in self.cells:
            for name in cells.implants:
                if name not in self.implants:
                    raise ValueError(f"cells name the implant {name!r}, which the plan lacks")
            for name in cells.defenses:
                if name not in SETTINGS and ":" not in name:
                    raise ValueError(f"{name!r} is no defence; known are {', '.join(SETTINGS)}, and module:name")
            for name in cells.off:
                if name not in cells.defenses:
                    raise ValueError(f"`off` names {name!r}, which is no defence of these cells")
        asked = Counter(key for group in self.groups() for key in self.keys(group, "clean"))
        twice = [key for key, times in asked.items() if times > 1]
        if twice:
            raise ValueError(f"two blocks of cells ask for the same line: {' '.join(map(str, twice[0]))}")
        return self

    @property
    def digest(self) -> str:
        """sha256 of all that the plan says."""
        return digest(self.model_dump(mode="json"))

    def groups(self) -> list[Group]:
        """Every defence of every suspect, suspects together, in the plan's order."""
        found = [group for cells in self.cells for group in self._groups(cells)]
        units = list(dict.fromkeys(group.unit for group in found))
        return sorted(found, key=lambda group: units.index(group.unit))

    def keys(self, group: Group, split: Split) -> list[Key]:
        """The lines that a group gives."""
        rest = (group.defense, group.seed, group.shots)
        counted = [
            Key(split, name, CONTROL if group.control else self.implants[name].attack, *rest) for name in group.implants
        ]
        return counted + ([Key(split, name, OFF, *rest) for name in group.implants] if group.off else [])

    def settings(self, key: Key) -> str:
        """Digest of all that the plan says of a line, and of the defence's own settings.

        What the plan does not say is not in it: an attack's own recipe, what lies in the data's folders, the code of a
        method or of a defence of one's own. Take the lines out to have them measured again; those of another version
        of CBPT's search are measured again anyhow.
        """
        implant = self.implants[key.implant]
        about = {"template": self.template, "dataset": self.datasets[implant.dataset].model_dump(mode="json")}
        rest = {"implant": implant.model_dump(mode="json"), "key": key, "defense": settings_of(key.defense)}
        return digest(about | rest)[:_SHORT]

    def shard(self, number: int, of: int) -> list[Group]:
        """Part `number` (from 1) of `of`: no suspect stands in two parts, and each takes about as long.

        The longest first, each to the part that has least: the same plan always gives the same parts.
        """
        if not 1 <= number <= of:
            raise InputError(f"shard {number}/{of} is none; pass 1/{of} to {of}/{of}")
        groups = self.groups()
        units = {group.unit: self.hours([other for other in groups if other.unit == group.unit]) for group in groups}
        loads, parts = [0.0] * of, {}
        for unit in sorted(units, key=lambda name: (-units[name], name)):
            parts[unit] = loads.index(min(loads))
            loads[parts[unit]] += units[unit]
        return [group for group in groups if parts[group.unit] == number - 1]

    def hours(self, groups: Sequence[Group]) -> float:
        """What groups are expected to take from an empty WORK on: implants included, and the control's `triggers`."""
        made = {name for name, implant in self.implants.items() if implant.folder is None}
        planted = {group.suspect for group in groups if not group.control} & made
        drawn = {name for group in groups if group.control for name in group.implants} & made - planted
        making = len(planted) * self.minutes.get("implant", 0) + len(drawn) * self.minutes.get("trigger", 0)
        return (sum(group.minutes for group in groups) + making) / 60

    def _groups(self, cells: Cells) -> list[Group]:
        if cells.control:
            sets = dict.fromkeys(self.implants[name].dataset for name in cells.implants)
            suspects = {name: tuple(i for i in cells.implants if self.implants[i].dataset == name) for name in sets}
        else:
            suspects = {name: (name,) for name in cells.implants}
        minutes = self.minutes | cells.minutes
        return [
            Group(
                suspect=suspect,
                dataset=self.implants[implants[0]].dataset,
                control=cells.control,
                implants=implants,
                off=defense in cells.off,
                final_only=cells.final_only,
                defense=defense,
                seed=seed,
                shots=shots,
                minutes=minutes.get(defense, 0),
            )
            for suspect, implants in suspects.items()
            for shots in cells.shots
            for seed in cells.seeds
            for defense in cells.defenses
        ]


def digest(value: object) -> str:
    """sha256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
