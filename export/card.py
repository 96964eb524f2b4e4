"""The bundle's README.md: a short model card for whoever finds the folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cbpt_guard.manifest import Manifest

_SHOWN: Final = 50
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&:@$])")

_CARD = """\
# Guarded zero-shot classifier

{classes} classes on {architecture}, purified by class-wise backdoor prompt tuning (cbpt-guard {version}).

**Verdict: {verdict}.**{reasons}

| on {images} held-out images | value |
|---|---|
| clean accuracy, undefended | {original} |
| clean accuracy, guarded | {guarded} |
| worst found-trigger attack success rate, guarded | {asr} |
| flagged, clean images | {flagged_clean} |
| flagged, images under the found trigger that is missed most | {flagged_found} |
| largest logit difference of the ONNX file against torch | {difference:.2g} (bound {bound:.2g}) |

Found triggers are those that inversion found; an attack that differs from all of them may do better.

## Use

```python
from cbpt_guard import GuardedClassifier

guard = GuardedClassifier.load("path/to/this/folder")
print(guard.predict("image.jpg").label)
```

It needs `pip install "cbpt-guard[cpu]"`, not torch. `cbpt-guard verify` checks the files against
`manifest.json`. Any other ONNX runtime gives the same guarded answers: `{input}` takes uint8 RGB
(N, {size}, {size}, 3), resized ({resize}, {interpolation}) and cropped, not normalised; `logits` answers.

## The rule

{rule}

## What is not protected

Everything but this zero-shot classifier over the classes below. The image encoder is the suspect's own:
retrieval, captioning or a linear probe on `embedding` stay open to the attacker.

## Classes

{listed}

Source checkpoint: {source}, sha256 `{sha256}`.
"""


def card(manifest: Manifest, classes: Sequence[str]) -> str:
    """The text of README.md."""
    variant = next(iter(manifest.variants.values()))
    gate, parity, rule = variant.gate, variant.parity, manifest.rule
    return _CARD.format(
        classes=len(classes),
        architecture=escaped(manifest.model.architecture),
        version=manifest.cbpt_guard,
        verdict=manifest.verdict,
        reasons="".join(f"\n- {escaped(reason)}" for reason in manifest.reasons),
        images=gate.images,
        original=_percent(gate.clean_accuracy_original),
        guarded=_percent(gate.clean_accuracy),
        asr=_percent(gate.found_trigger_asr),
        flagged_clean=_percent(rule.flagged_clean),
        flagged_found=_percent(rule.flagged_found),
        difference=parity.max_logit_difference,
        bound=parity.bound,
        input=manifest.graph.input,
        size=manifest.preprocess.size,
        resize=manifest.preprocess.resize_mode,
        interpolation=manifest.preprocess.interpolation,
        rule=_rule(manifest),
        listed=_listed(classes),
        source=escaped(manifest.model.source),
        sha256=manifest.model.source_sha256,
    )


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: class names come from the folders of strangers."""
    return _MARKUP.sub(r"\\\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def _rule(manifest: Manifest) -> str:
    names = ", ".join(escaped(suspect.label) for suspect in manifest.rule.suspects) or "none"
    if manifest.rule.name == "prompts":
        text = "`prompts`: the tuned prompts answer every image; `triggered` is a flag only."
    else:
        text = (
            "`switch`: an image that answers a suspected target and fails its test is answered by the tuned "
            "prompts with that class left out; any other by the original ones."
        )
    return f"{text} Suspected targets: {names}."


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(escaped(label) for label in classes[:_SHOWN])
    return shown if len(classes) <= _SHOWN else f"{shown} and {len(classes) - _SHOWN} more in `labels.json`"


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
