"""The settings of every defence, stated: frozen values, free of torch, so that a plan can digest them.

Where a setting is a tuple of values, the defence chooses among them on held-out shots, `held_out` of each class's as
with CBPT; of equals the first is taken, and below four shots a class the choice falls on the shots themselves. No
setting is chosen on test images; on a true trigger the oracle's choices alone are made. CBPT's own defaults were
developed on development images of some attacks, their triggers known to us (docs/notebook.md says which).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cbpt_guard.bench.templates import TEMPLATES
from cbpt_guard.defense.settings import Count, Positive, RuleSettings, Settings, Share, TuningSettings

_NotNegative = Annotated[float, Field(ge=0)]
_Grid = Annotated[tuple[Positive, ...], Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Chosen(_Frozen):
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2


class ProbeSettings(_Chosen):
    """The linear probe of CLIP's paper (arXiv 2103.00020): logistic regression, L-BFGS, at most 1,000 iterations.

    `strengths` are inverse weights of the L2 penalty (scikit-learn's C).
    """

    strengths: _Grid = (1, 0.1, 0.3, 3, 10, 30, 100, 1000)
    iterations: Count = 1000


class CoopSettings(_Chosen):
    """CoOp (arXiv 2109.01134): one context for all classes, from "a photo of a"; SGD, cosine, one epoch of warm-up.

    The authors' published settings for 16 shots are 200 epochs in batches of 32 at 0.002. Features are cached here and
    the text tower is what costs, so batches are 16 times larger and the learning rate too, with a factor of 4 to both
    sides; and epochs are 50, of which the best on held-out shots is taken.
    """

    epochs: Count = 50
    batch: Count = 512
    learning_rates: _Grid = (0.032, 0.008, 0.128)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: _NotNegative = 5e-4
    warm_up: Positive = 1e-5


class CleanPromptsSettings(_Chosen):
    """CBPT's second stage without triggers; `tuning` as CBPT has it but for the learning rate."""

    learning_rates: _Grid = (1e-2, 3e-3, 1e-3)
    tuning: TuningSettings = TuningSettings()


class OracleSettings(_Chosen):
    """Linear head and class-wise prompts trained with the true triggers."""

    strengths: _Grid = (10, 1, 3, 30, 100, 300, 1000)
    iterations: Count = 1000
    learning_rates: _Grid = (1e-2, 3e-3)
    tuning: TuningSettings = TuningSettings()


class FineTuneSettings(_Chosen):
    """Fine-tuning of the whole CLIP on the shots with CLIP's loss: 10 epochs, batches of 64, AdamW, cosine.

    The papers' learning rates, about 1e-5, are for some 10,000 steps; the shots give some 400. Learning rates are tried
    for `trial_epochs`, the largest first, until one keeps the held-out accuracy: the more weights move, the more of a
    backdoor goes. Of the epochs it is the last that keeps the accuracy. To keep is to fall short of the undefended
    accuracy by at most `accuracy_slack`, as with CBPT; where none does, the most accurate is taken.
    """

    epochs: Count = 10
    batch: Annotated[int, Field(ge=2)] = 64
    learning_rates: _Grid = (3e-5, 1e-4, 3e-4)
    trial_epochs: Count = 2
    weight_decay: _NotNegative = 0.1
    warm_up_steps: Annotated[int, Field(ge=0)] = 10
    accuracy_slack: Share = 0.005
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = TEMPLATES


class CleanClipSettings(FineTuneSettings):
    """CleanCLIP (arXiv 2303.03323): CLIP's loss plus self-supervision within each modality, equally weighed.

    Images are augmented by AutoAugment's policy for ImageNet and texts by word operations, as in the paper, whose
    published command trains 10 epochs in batches of 64, at 1e-5 after 50 steps of warm-up; on 250,000 pairs, as RVPT's
    paper has it.
    """

    inter: _NotNegative = 1.0
    intra: _NotNegative = 1.0


class ParSettings(FineTuneSettings):
    """PAR (arXiv 2412.00727): CLIP's loss less the distance to the suspect's own embeddings.

    `thresholds` bound the squared distance of unit embeddings, which is at most 4: beyond it nothing is gained. Each
    is tried with each learning rate, the larger threshold first. The authors' published script trains 2 epochs on
    250,000 pairs in batches of 512, with a threshold of 2.15, at a learning rate that falls from 3e-5, and takes half
    of either distance. On the few shots here 2.15 costs more accuracy than may be lost (docs/notebook.md), and the
    whole distance is taken.
    """

    thresholds: _Grid = (0.25, 1.0)


FT = FineTuneSettings()
CLEANCLIP = CleanClipSettings()
PAR = ParSettings()
PROBE = ProbeSettings()
COOP = CoopSettings()
CLEAN_PROMPTS = CleanPromptsSettings()
ORACLE = OracleSettings()
CBPT = Settings()
CBPT_PROMPTS = CBPT.model_copy(update={"rule": RuleSettings(name="prompts")})

ABLATIONS = "cbpt_guard.bench.ablations:"
"""What the names of CBPT's variants begin with."""
TRUE_TRIGGER = f"{ABLATIONS}true_trigger"
"""The variant that no found trigger is in."""
SETTINGS: dict[str, BaseModel | None] = {
    "none": None,
    "ensemble": None,
    "ft": FT,
    "cleanclip": CLEANCLIP,
    "par": PAR,
    "coop": COOP,
    "clean-prompts": CLEAN_PROMPTS,
    "probe": PROBE,
    "cbpt-prompts": CBPT_PROMPTS,
    "cbpt": CBPT,
    "oracle": ORACLE,
}
"""The settings of each defence of `DEFENSES`."""
INDEPENDENT = ("none", "ensemble", "ft", "cleanclip", "par", "coop", "clean-prompts", "probe", "oracle")
"""Those that take no more from each other than the images' features; both rules of CBPT answer from one run."""


def settings_of(name: str) -> dict[str, Any]:
    """A defence's settings as JSON has them; empty where it has none, or is one's own (`module:name`).

    Ablations start from CBPT's, so that their lines age with its.
    """
    settings = CBPT if name.startswith(ABLATIONS) else SETTINGS.get(name)
    return {} if settings is None else settings.model_dump(mode="json")
