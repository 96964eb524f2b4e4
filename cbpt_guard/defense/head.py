"""Heads: frozen text rows that turn image features into logits, and the rule that joins two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.errors import InputError

Rule = Literal["switch", "prompts"]
LEFT_OUT = -1e4
"""The logit of a class that the rule leaves out: softmax gives it 0, and float16 still holds it."""

_PART = 4096  # images
_BY_CLASS = ("original_rows", "guarded_rows", "directions", "thresholds")


@dataclass(frozen=True)
class Head:
    """A linear classifier: rows (C, E), the model's logit scale and bias.

    Rows of texts are unit vectors; anchored ones (`anchored.py`) are of any length.
    """

    rows: Tensor
    scale: float
    bias: float = 0.0

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of unit features (N, E)."""
        return self.scale * features @ self.rows.T + self.bias

    def answers(self, features: Tensor) -> Tensor:
        """The answered classes (N,) of unit features (N, E); logits of a part at a time, for they grow with C."""
        return torch.cat([self.logits(part).argmax(dim=1) for part in features.split(_PART)])

    def leads(self, features: Tensor) -> Tensor:
        """By how many logits each class is ahead of the best other one, (N, C), for unit features (N, E)."""
        logits = self.logits(features)
        first, second = logits.topk(2, dim=1).values.unbind(1)
        return logits - torch.where(logits == first[:, None], second[:, None], first[:, None])

    def missing(self, features: Tensor, wanted: Tensor) -> Tensor:
        """How far unit features (N, E) are from the answers `wanted` (N,): cross-entropy, (N,)."""
        return F.cross_entropy(self.logits(features), wanted, reduction="none")

    def reached(self, features: Tensor, clean: Tensor, labels: Tensor) -> Reached:
        """How many images a trigger leads to each class.

        Those count that are of other classes and whose clean features (N, E) are answered with others, too: what is
        answered with the class anyway says nothing of the trigger that `features` (N, E) are under.
        """
        answers, before, classes = self.answers(features), self.answers(clean), len(self.rows)
        led = answers[(answers != labels) & (answers != before)].bincount(minlength=classes)
        own = labels.bincount(minlength=classes) + before[before != labels].bincount(minlength=classes)
        return Reached(led, len(labels) - own)


@dataclass(frozen=True)
class Reached:
    """How many images a trigger led to each class (C,), of how many that it could lead there (C,)."""

    led: Tensor
    of: Tensor

    @property
    def share(self) -> Tensor:
        """Of the images that could be led, (C,) in [0, 1]; 0 where there is none."""
        return self.led / self.of.clamp(min=1)

    @property
    def surely(self) -> Tensor:
        """The same with one image more that was not led, (C,): a few images are no certainty."""
        return self.led / (self.of + 1)


@dataclass(frozen=True)
class Answer:
    """Guarded logits (N, C), the rule's flag (N,) and the zero-shot logits (N, C)."""

    logits: Tensor
    triggered: Tensor
    original: Tensor


@dataclass(frozen=True)
class TriggerTest:
    """One linear test for each suspected class: does an image that answers it lie where its trigger puts images?

    `directions` (C, E) and `thresholds` (C,); a class that is not suspected has a zero direction and an
    infinite threshold, so that its images never fail the test.
    """

    directions: Tensor
    thresholds: Tensor

    @classmethod
    def none(cls, classes: int, width: int) -> TriggerTest:
        """The test that suspects nothing."""
        return cls(torch.zeros(classes, width), torch.full((classes,), float("inf")))

    def fires(self, features: Tensor, answer: Tensor) -> Tensor:
        """The flag (N,) of unit features (N, E) whose zero-shot answers are `answer` (N,)."""
        return self.margin(features, answer) > 0

    def margin(self, features: Tensor, answer: Tensor) -> Tensor:
        """How far (N,), as a cosine, unit features (N, E) lie past the thresholds of the answers (N,)."""
        return (features * self.directions[answer]).sum(dim=1) - self.thresholds[answer]


def apply_rule(original: Tensor, guarded: Tensor, triggered: Tensor, rule: Rule) -> Tensor:
    """Join two heads' logits (N, C) by the rule into the guarded answer's logits.

    `switch` answers a triggered image from the guarded head with the suspected class left out and any other
    from the zero-shot head, untouched; `prompts`, the paper's rule, answers every image from the guarded head.
    """
    if rule == "prompts":
        return guarded
    classes = torch.arange(original.shape[1], device=original.device)
    left_out = guarded.masked_fill(classes == original.argmax(dim=1)[:, None], LEFT_OUT)
    return torch.where(triggered[:, None], left_out, original)


@dataclass(frozen=True)
class GuardedHead:
    """Two heads over one embedding, the test for triggered images, and the rule that chooses between the heads.

    `prompts`: the tuned class-wise prompts, where the guarded head is another.
    """

    original: Head
    guarded: Head
    test: TriggerTest
    classes: tuple[str, ...]
    rule: Rule = "switch"
    prompts: Head | None = None

    @property
    def suspects(self) -> list[int]:
        """Indices of the suspected target classes."""
        return torch.isfinite(self.test.thresholds).nonzero().flatten().tolist()

    def with_rule(self, rule: Rule) -> GuardedHead:
        """The same heads under another rule; `prompts` is about the tuned prompts."""
        if rule == "prompts" and self.prompts is not None:
            return replace(self, rule=rule, guarded=self.prompts, prompts=None)
        return replace(self, rule=rule)

    def answer(self, features: Tensor) -> Answer:
        """Answers for unit image features (N, E)."""
        original = self.original.logits(features)
        guarded = self.guarded.logits(features)
        triggered = self.test.fires(features, original.argmax(dim=1))
        return Answer(apply_rule(original, guarded, triggered, self.rule), triggered, original)

    def answers(self, features: Tensor) -> Tensor:
        """The answered classes (N,) of unit features (N, E), by the rule."""
        return self.answer(features).logits.argmax(dim=1)

    def missing(self, features: Tensor, wanted: Tensor) -> Tensor:
        """How far unit features (N, E) are from the answers `wanted` (N,) by the rule, (N,).

        For an attacker who knows the switch and goes straight: the zero-shot head must answer the class and its test
        must not fire, so what lies past the threshold is added to the cross-entropy, in logits. The detour through
        another suspect's test, whose images the guarded head might answer with the class, is not followed.
        """
        if self.rule == "prompts":
            return self.guarded.missing(features, wanted)
        seen = self.test.margin(features, wanted).clamp(min=0)
        return self.original.missing(features, wanted) + self.original.scale * seen

    def save(self, path: Path) -> None:
        """Write `heads.safetensors`."""
        tensors = {
            "original_rows": self.original.rows,
            "guarded_rows": self.guarded.rows,
            "directions": self.test.directions,
            "thresholds": self.test.thresholds,
            "scale": torch.tensor(self.original.scale, dtype=torch.float64),
            "bias": torch.tensor(self.original.bias, dtype=torch.float64),
        }
        if self.prompts is not None:
            tensors["prompt_rows"] = self.prompts.rows
        # one key: safetensors writes several in an order of its own, and equal heads must be equal bytes
        metadata = {"head": json.dumps({"rule": self.rule, "classes": self.classes})}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> GuardedHead:
        """Read `heads.safetensors`.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                about = json.loads(file.metadata()["head"])
            scale, bias = tensors["scale"].item(), tensors["bias"].item()
            rule, classes = about["rule"], tuple(about["classes"])
            if rule not in ("switch", "prompts"):
                raise ValueError(f"the rule {rule!r} is unknown")
            prompts = tensors.get("prompt_rows")
            by_class = [*(tensors[name] for name in _BY_CLASS), *([] if prompts is None else [prompts])]
            if any(len(tensor) != len(classes) for tensor in by_class):
                raise ValueError(f"its tensors do not fit its {len(classes)} classes")
            return cls(
                Head(tensors["original_rows"], scale, bias),
                Head(tensors["guarded_rows"], scale, bias),
                TriggerTest(tensors["directions"], tensors["thresholds"]),
                classes,
                rule,
                None if prompts is None else Head(prompts, scale, bias),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is no heads file of cbpt-guard: {error}") from error
