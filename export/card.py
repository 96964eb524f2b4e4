"""The bundle's README.md: a short model card for whoever finds the folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cbpt_guard.manifest import Manifest, Variant

_SHOWN: Final = 50
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&:@$])")

_CARD = """\
# Guarded zero-shot classifier

{classes} classes on {architecture}, purified by cbpt-guard {version}, after class-wise backdoor prompt tuning.

**Verdict: {verdict}.**{reasons}

| on {images} {images_are} | value |
|---|---|
| clean accuracy, undefended | {original} |
| clean accuracy, guarded | {guarded} |
| worst found-trigger attack success rate, guarded | {asr} |
| flagged, clean images | {flagged_clean} |
| flagged, images under the found trigger that is missed most | {flagged_found} |
{differences}

Found triggers are those that inversion found; an attack that differs from all of them may do better.

## Intended use

Zero-shot classification of images among the classes below, where the model's origin is not trusted. An answer
under a trigger is the best remaining class, not proof that the image is harmless; log `triggered` and look.

## Use

```python
from cbpt_guard import GuardedClassifier

guard = GuardedClassifier.load("path/to/this/folder")
print(guard.predict("image.jpg").label)
```

It needs cbpt-guard with its `cpu` (or `gpu`) extra, from where this was exported or from a wheel of yours
(`pip install '.[cpu]'` in a checkout), not torch. `cbpt-guard verify` checks the files against
`manifest.json` and prints the bundle's digest; pass it as `load(..., digest="sha256:...")`, for only a digest or a
signature (`verify --key`) tells a replaced bundle. What is inside, by sha256 and version: `sbom.cdx.json`.

Any other ONNX runtime gives the same guarded answers: `{input}` takes uint8 RGB (N, {size}, {size}, 3), resized
({resize}, {interpolation}) and cropped, not normalised; `logits` answers.

## The rule

{rule}

## What is not protected

Everything but this zero-shot classifier over the classes below. The image encoder is the suspect's own:
retrieval, captioning or a linear probe on `embedding` stay open to the attacker.

## Classes

{listed}

## Source

Checkpoint: {source}, sha256 `{sha256}`. The weights are its own, unchanged, and so is their licence.
Made on {created} with settings that `manifest.json` holds.
"""


def card(manifest: Manifest, classes: Sequence[str], *, held_out: bool) -> str:
    """The text of README.md; `held_out`: whether the gate's images were kept from tuning."""
    variant = next(iter(manifest.variants.values()))
    gate, rule = variant.gate, manifest.rule
    return _CARD.format(
        classes=len(classes),
        architecture=escaped(manifest.model.architecture),
        version=manifest.cbpt_guard,
        verdict=manifest.verdict,
        reasons="".join(f"\n- {escaped(reason)}" for reason in manifest.reasons),
        images=gate.images,
        images_are="held-out images" if held_out else "images that were tuned on (none was held out)",
        original=_percent(gate.clean_accuracy_original),
        guarded=_percent(gate.clean_accuracy),
        asr=_percent(gate.found_trigger_asr),
        flagged_clean=_percent(rule.flagged_clean),
        flagged_found=_percent(rule.flagged_found),
        differences="\n".join(_difference(name, variant) for name, variant in manifest.variants.items()),
        input=manifest.graph.input,
        size=manifest.preprocess.size,
        resize=manifest.preprocess.resize_mode,
        interpolation=manifest.preprocess.interpolation,
        rule=_rule(manifest),
        listed=_listed(classes),
        source=escaped(manifest.model.source),
        sha256=manifest.model.source_sha256,
        created=escaped(manifest.created),
    )


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: class names come from the folders of strangers."""
    return _MARKUP.sub(r"\\\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def _difference(name: str, variant: Variant) -> str:
    """A row about one graph: its parity with torch, or what it reached as a variant of its own."""
    if variant.parity is not None:
        shown = f"{variant.parity.max_logit_difference:.2g} (bound {variant.parity.bound:.2g})"
        return f"| `{name}`: largest logit difference of the ONNX file against torch | {shown} |"
    same = None if variant.agreement is None else variant.agreement.clean
    shown = f"{_percent(variant.gate.clean_accuracy)}, {_percent(variant.gate.found_trigger_asr)}, {_percent(same)}"
    return f"| `{name}` ({variant.method}): clean accuracy, found-trigger ASR, same answer as fp32 | {shown} |"


def _rule(manifest: Manifest) -> str:
    names = ", ".join(escaped(suspect.label) for suspect in manifest.rule.suspects) or "none"
    if manifest.rule.name == "prompts":
        text = "`prompts`: the tuned prompts answer every image; `triggered` is a flag only."
    else:
        text = (
            "`switch`: an image that answers a suspected target and fails its test is answered from rows fitted to "
            "triggered images, with that class left out; any other from the original ones."
        )
    return f"{text} Suspected targets: {names}."


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(escaped(label) for label in classes[:_SHOWN])
    return shown if len(classes) <= _SHOWN else f"{shown} and {len(classes) - _SHOWN} more in `labels.json`"


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
