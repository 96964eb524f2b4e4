"""The options that `purify` and `scan` have in common: what is suspected, and how it is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Option(help="The suspect: a checkpoint file or an open_clip folder.")]
Data = Annotated[Path, typer.Option(help="Clean images: a folder of class folders, or a CSV (path,label).")]
Classes = Annotated[
    Path | None, typer.Option(help="UTF-8 lines: folder<TAB>name renames, a line without TAB adds a class.")
]
Template = Annotated[str, typer.Option(help="The prompt, with {} for the class name.")]
Shots = Annotated[int | None, typer.Option(min=1, help="At most so many images of each class.")]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", help="Settings that differ from the defaults, a TOML file."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of every draw; on one machine a seed gives one result.")]
Device = Annotated[str, typer.Option(help="Torch's device: cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]
Arch = Annotated[str | None, typer.Option(help="The architecture: open_clip's name or a JSON file.")]
QuickGelu = Annotated[
    bool | None,
    typer.Option(
        "--quickgelu/--no-quickgelu", help="Whether the towers use QuickGELU; asked for where the file cannot tell."
    ),
]
Preprocess = Annotated[str | None, typer.Option(help="The preprocessing: openai, siglip, ... or a JSON file.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="A folder with the tokenizer's files, for models that bring their own.")
]
Digest = Annotated[
    str | None, typer.Option(help="Accept only the bundle of this digest, sha256:..., as `verify` prints it.")
]
Precision = Annotated[str, typer.Option(help="Which of the bundle's graphs: fp32, fp16 or int8.")]
TEMPLATE = "a photo of a {}."
