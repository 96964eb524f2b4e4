"""What a run writes down about itself: `run.json` and `metrics.json` as frozen values."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cbpt_guard.images import Preprocess
from cbpt_guard.manifest import RuleName, Suspect, VerdictName


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Frozen):
    """The suspect: where it came from, what it is, and how each thing that a file cannot tell was resolved."""

    source: str
    source_sha256: str
    form: str
    architecture: str
    config: dict[str, Any]
    preprocess: Preprocess
    quickgelu: bool
    tokenizer: str
    resolved: dict[str, str]
    notes: tuple[str, ...]

    def understanding(self) -> dict[str, Any]:
        """How the file was understood: all that decides which features its weights give an image or a text."""
        return self.model_dump(mode="json", include={"config", "preprocess", "quickgelu", "tokenizer"})


class DataRecord(_Frozen):
    """The clean images: how many of each class were tuned on and held out, and what was left out."""

    shots: dict[str, int]
    held_out: int
    without_images: tuple[str, ...]
    skipped: tuple[str, ...]
    triggered_images: int


class Candidate(_Frozen):
    """A possible target: its share of the answers under the agnostic trigger and on clean images.

    `area` is the part of the image that its masked trigger needs, None where a scan made none since the class stands
    out without; `natural` what classes of middle rank need, or, where every class is a candidate, the others; None
    where there is none to compare with, or no area. `faint` is the root of how far a scan with fainter patterns puts it
    ahead, 0 where that is not enough to stand out. `raised`: whether it stands out only under an agnostic trigger of
    higher patterns, which the shares are then of. `score` is what `stands_out` compares: the odds of the class under an
    agnostic trigger, a plain wave or an edit, or how far the scan, or a patch, a warp or a tint, puts it ahead,
    whichever is most. Where none of those makes it stand out, how many times less area it needs counts, too, and the
    lesser of `faint` and the square of that.
    """

    label: str
    index: int
    share: float
    share_clean: float
    area: float | None = None
    natural: float | None = None
    faint: float = 0.0
    raised: bool = False
    score: float
    stands_out: bool


class Verdict(_Frozen):
    """What may be said of the run, and why."""

    name: VerdictName
    reasons: tuple[str, ...]


class RunRecord(_Frozen):
    """`run.json`; `search` is the version of the search that found the candidates, None in runs that do not say it."""

    format: Literal[1] = 1
    cbpt_guard: str
    created: str
    seed: int
    template: str
    rule: RuleName
    settings: dict[str, Any]
    model: ModelRecord
    data: DataRecord
    search: int | None = None
    candidates: tuple[Candidate, ...]
    suspects: tuple[Suspect, ...]
    verdict: Verdict
    warnings: tuple[str, ...]
    epoch: int
    seconds: dict[str, float]
    versions: dict[str, str]


Origin = Literal["found", "beside", "fresh", "observed"]


class TriggerMetrics(_Frozen):
    """ASR, PA and the largest share of one class on held-out images under one trigger; shares in [0, 1].

    `origin`: `found` (the bank), `beside` (an edit beside it), `fresh` (made with other draws, and not tuned on) or
    `observed`, whose images bear no labels: then ASR is the share that answers the target, and PA is unknown.
    `against`: what a fresh trigger was made to mislead. The largest shares are None in runs that do not say them.
    """

    origin: Origin
    family: str
    against: str | None = None
    target: str
    images: int
    asr_before: float
    asr_after: float
    asr_prompts: float
    pa_before: float | None
    pa_after: float | None
    pa_prompts: float | None
    max_share_before: float | None = None
    max_share_after: float | None = None
    max_share_prompts: float | None = None


class ClassMetrics(_Frozen):
    """Clean recall of one class on held-out images; None where no image was held out."""

    label: str
    images: int
    before: float | None
    after: float | None
    after_prompts: float | None


class RunMetrics(_Frozen):
    """`metrics.json`: before and after, on `images` held-out images; `prompts` is the paper's rule beside the run's."""

    format: Literal[1] = 1
    images: int
    held_out: bool
    clean_accuracy_before: float
    clean_accuracy_after: float
    clean_accuracy_prompts: float
    flagged_clean: float
    flagged_found: float | None
    triggers: tuple[TriggerMetrics, ...]
    classes: tuple[ClassMetrics, ...]
