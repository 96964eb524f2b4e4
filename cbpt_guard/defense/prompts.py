"""ClassPrompts: one learnt context per class, read through the frozen text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.errors import InputError


def context_slots(clip: FrozenClip, template: str) -> tuple[int, int]:
    """Where the template's words before the class name stand among the tokens: [start, stop).

    Two short names bound the words: what two prompts share from the left is template, and what the bare
    names share is the start token.

    Raises:
        InputError: the template has no single {} or no word before it.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise InputError(f"the template {template!r} needs exactly one {{}} for the class name")
    start = _shared_prefix(clip.tokenizer(["x", "7"]))
    stop = _shared_prefix(clip.tokenizer([template.replace("{}", "x"), template.replace("{}", "7")]))
    if stop <= start:
        raise InputError(
            f"the template {template!r} has no word before the class name to tune; try 'a photo of a {{}}.'"
        )
    return start, stop


def check_prompts(clip: FrozenClip, classes: Sequence[str], template: str) -> None:
    """Refuse what cannot be tuned, before anything is computed.

    A tokenizer cuts a long text silently; a filler word behind it then leaves no trace.

    Raises:
        InputError: the template has no context to tune, or a prompt is longer than the tower's context.
    """
    context_slots(clip, template)
    texts = [template.replace("{}", name) for name in classes]
    ids, longer = clip.tokenizer(texts), clip.tokenizer([f"{text} x" for text in texts])
    cut = (ids == longer).all(dim=1).nonzero().flatten()
    if len(cut):
        name = classes[int(cut[0])]
        raise InputError(f"the prompt for class {name[:60]!r} does not fit into the model's {ids.shape[1]} tokens")


def _shared_prefix(ids: Tensor) -> int:
    return int((ids[0] != ids[1]).int().argmax())


class ClassPrompts:
    """Contexts (C, M, D) before the class names, each class with its own copy, initialised from the template.

    Only the contexts of the classes in `tuned` are learnt; the other rows stay cached, which is exact because
    a row depends on its own context alone.

    Raises:
        InputError: as `check_prompts`.
    """

    def __init__(self, clip: FrozenClip, classes: list[str], template: str, tuned: Tensor, chunk: int = 64) -> None:
        self._text = clip.text
        check_prompts(clip, classes, template)
        self.start, self.stop = context_slots(clip, template)
        ids = clip.tokenizer([template.replace("{}", name) for name in classes]).to(clip.device)
        ids = clip.text.cut(ids)
        self._position = clip.text.read_position(ids)
        with torch.no_grad():
            self._embedded = clip.text.embed(ids)
        self._tuned = tuned.to(clip.device)
        self._chunk = chunk
        self.contexts = self._embedded[:, self.start : self.stop].clone()
        self._learnt = self.contexts[self._tuned].requires_grad_()
        self._rows = self._encode_all(torch.arange(len(classes), device=clip.device), self.contexts)

    def parameters(self) -> list[Tensor]:
        """The learnt contexts, (tuned classes, M, D)."""
        return [self._learnt]

    def _encode(self, classes: Tensor, contexts: Tensor) -> Tensor:
        embedded = self._embedded[classes]
        parts = [embedded[:, : self.start], contexts, embedded[:, self.stop :]]
        return self._text.encode(torch.cat(parts, dim=1), self._position[classes])

    @torch.no_grad()
    def _encode_all(self, classes: Tensor, contexts: Tensor) -> Tensor:
        pairs = zip(classes.split(self._chunk), contexts.split(self._chunk), strict=True)
        return torch.cat([self._encode(part, context) for part, context in pairs])

    def rows(self) -> Tensor:
        """Unit text rows (C, E) of the contexts as they stand, without a graph, on the CPU as all features are."""
        rows = self._rows.clone()
        if len(self._tuned):
            rows[self._tuned] = self._encode_all(self._tuned, self._learnt)
        return rows.cpu()

    def backward(self, gradient: Tensor) -> None:
        """Add to the contexts' gradients, given the loss's gradient (C, E) in `rows()`.

        The second of two passes (as in GradCache, arXiv 2101.06983): each chunk of classes is encoded again
        with a graph, so that memory depends on the chunk and not on C.
        """
        gradient = gradient.to(self._tuned.device)[self._tuned]
        for part in torch.arange(len(self._tuned), device=gradient.device).split(self._chunk):
            self._encode(self._tuned[part], self._learnt[part]).backward(gradient[part])

    @torch.no_grad()
    def state(self) -> Tensor:
        """All contexts (C, M, D) as they stand, on the CPU."""
        contexts = self.contexts.clone()
        contexts[self._tuned] = self._learnt
        return contexts.cpu()


def save_contexts(path: Path, contexts: Tensor, template: str) -> None:
    """Write `prompts.safetensors`."""
    save_file({"contexts": contexts.contiguous()}, path, {"template": template})
