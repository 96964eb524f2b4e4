"""`manifest.json` as a frozen value: what a service or an auditor needs to know about a bundle."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbpt_guard.errors import BundleError
from cbpt_guard.images import Preprocess
from cbpt_guard.problems import problems

VerdictName = Literal["guarded", "not guarded", "unverified"]
RuleName = Literal["switch", "prompts"]

FORMAT = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Frozen):
    """One listed file: its digest and its size in bytes."""

    sha256: str
    size: Annotated[int, Field(ge=0)]


class ModelEntry(_Frozen):
    """Where the weights came from, and how each thing that a file cannot tell was resolved."""

    architecture: str
    source: str
    source_sha256: str
    resolved: dict[str, str]


class Suspect(_Frozen):
    """A suspected target class; an image that answers it is triggered where its unit embedding's dot product with the
    class's direction exceeds `threshold`."""

    label: str
    index: int
    threshold: float


class RuleEntry(_Frozen):
    """The answer rule inside the graph, and how often its flag fired when measured (shares in [0, 1])."""

    name: RuleName
    suspects: tuple[Suspect, ...]
    flagged_clean: float
    flagged_found: float | None


class Parity(_Frozen):
    """Worst logit difference of the graph against torch, and the bound it kept.

    `images` counts the run's held-out ones, and some of them again under each found trigger.
    """

    images: int
    max_logit_difference: float
    bound: float


class Gate(_Frozen):
    """What a variant reached on the run's held-out images, through its own ONNX file (shares in [0, 1]).

    Of a run that held none out these are images that it was tuned on; such a run is never "guarded".
    """

    images: int
    clean_accuracy: float
    clean_accuracy_original: float
    found_trigger_asr: float | None


class Agreement(_Frozen):
    """How often a reduced precision answers as the fp32 graph does on `images` of the gate's images (shares in [0, 1]).

    `triggered` is the same under the found trigger where it is least, and `least` the share that was demanded of
    clean images. The logits compared are the zero-shot ones.
    """

    images: int
    clean: float
    triggered: float | None
    max_logit_difference: float
    least: float


class Variant(_Frozen):
    """One precision of the graph: the fp32 graph has a parity with torch, any other an agreement with that graph.

    `golden` is the file of its own golden answers, and `tolerance` what they may differ by; None is the bundle's.
    """

    file: str
    parity: Parity | None = None
    gate: Gate
    agreement: Agreement | None = None
    method: str | None = None
    golden: str = "golden.npz"
    tolerance: float | None = None


class Graph(_Frozen):
    """What stands at the graph's two doors."""

    opset: int
    input: str
    outputs: tuple[str, ...]


class Manifest(_Frozen):
    """`manifest.json`, written last: everything a service or an auditor needs to know about a bundle."""

    format: Literal[1] = 1
    cbpt_guard: str
    created: str
    verdict: VerdictName
    reasons: tuple[str, ...]
    allow_unguarded: bool
    model: ModelEntry
    preprocess: Preprocess
    rule: RuleEntry
    graph: Graph
    variants: dict[str, Variant] = Field(min_length=1)
    golden_tolerance: float
    tools: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, FileEntry]

    def tolerance(self, variant: Variant) -> float:
        """How far, in logits, a variant's answers may be off its golden ones."""
        return self.golden_tolerance if variant.tolerance is None else variant.tolerance


def parse_manifest(data: bytes) -> Manifest:
    """The manifest of a `manifest.json`; `BundleError` when it is malformed or of another format version."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is no JSON: {error}") from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise BundleError(f"this bundle is format {version}; this version of cbpt-guard reads {FORMAT}")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        found = problems(error, most=3)
        raise BundleError(f"manifest.json is malformed in {error.error_count()} places: {found}") from error
