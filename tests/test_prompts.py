"""Class-wise prompts: exact where they claim to be, and refusing what cannot be tuned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from planted import NAMES, TEMPLATE, frozen, snapshot
from small_clips import VIT
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.prompts import ClassPrompts, check_prompts, context_slots
from cbpt_guard.errors import InputError

TEXTS = [TEMPLATE.replace("{}", name) for name in NAMES]
BIDIRECTIONAL = {**VIT, "custom_text": True, "text_cfg": {**VIT["text_cfg"], "no_causal_mask": True}}
LAST_TOKEN = {**VIT, "custom_text": True, "text_cfg": {**VIT["text_cfg"], "pool_type": "last"}}
ALL = torch.arange(len(NAMES))
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return frozen()


@pytest.fixture(params=EXACT, ids=str)
def typed(request: pytest.FixtureRequest) -> FrozenClip:
    clip = frozen()
    clip.model.to(request.param)
    return clip


def full_length(clip: FrozenClip, texts: list[str]) -> Tensor:
    ids = clip.tokenizer(texts)
    return clip.text.encode(clip.text.embed(ids), clip.text.read_position(ids))


def open_clips_own(clip: FrozenClip, texts: list[str]) -> Tensor:
    features: Tensor = clip.model.encode_text(clip.tokenizer(texts), normalize=True)
    return features


def moved(clip: FrozenClip, tuned: Tensor, chunk: int = 64) -> ClassPrompts:
    """Prompts whose contexts left their start."""
    prompts = ClassPrompts(clip, NAMES, TEMPLATE, tuned, chunk)
    with torch.no_grad():
        (learnt,) = prompts.parameters()
        learnt += 0.1 * torch.randn(learnt.shape, generator=torch.Generator().manual_seed(1))
    return prompts


def test_a_cut_tower_equals_the_full_one(typed: FrozenClip) -> None:
    bound = EXACT[typed.model.logit_scale.dtype]
    ids = typed.tokenizer(TEXTS)
    assert typed.text.causal
    assert typed.text.cut(ids).shape[1] < ids.shape[1], "something was cut"
    rows = typed.encode_texts(TEXTS)
    assert rows.dtype == typed.model.logit_scale.dtype
    for whole in (full_length(typed, TEXTS), open_clips_own(typed, TEXTS)):
        assert (rows - whole).abs().max() <= bound
    assert rows.norm(dim=1).allclose(torch.ones(len(TEXTS), dtype=rows.dtype), atol=1e-6)


@pytest.mark.parametrize("config", [BIDIRECTIONAL, LAST_TOKEN], ids=["no causal mask", "last token"])
def test_a_tower_that_reads_the_padding_is_not_cut(config: dict[str, object]) -> None:
    clip = frozen(config)
    ids = clip.tokenizer(TEXTS)
    assert not clip.text.causal
    assert clip.text.cut(ids).shape == ids.shape
    rows = clip.encode_texts(TEXTS)
    assert torch.allclose(rows, open_clips_own(clip, TEXTS), atol=1e-6)
    longest = int(ids.argmax(dim=1).max()) + 1
    short = clip.text.encode(clip.text.embed(ids[:, :longest]), clip.text.read_position(ids[:, :longest]))
    assert not torch.allclose(rows, short, atol=1e-4), "cutting this tower would change it"


@pytest.mark.parametrize("config", [VIT, BIDIRECTIONAL, LAST_TOKEN], ids=["causal", "no causal mask", "last token"])
def test_untouched_contexts_are_the_template(config: dict[str, object]) -> None:
    clip = frozen(config)
    prompts = ClassPrompts(clip, NAMES, TEMPLATE, ALL)
    assert torch.allclose(prompts.rows(), clip.encode_texts(TEXTS), atol=1e-6)
    assert prompts.state().shape == (len(NAMES), 4, 32)


def test_the_order_of_classes_and_the_chunk_do_not_matter(clip: FrozenClip) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = ClassPrompts(clip, [NAMES[i] for i in order], TEMPLATE, ALL, chunk=2)
    rows = ClassPrompts(clip, NAMES, TEMPLATE, ALL).rows()
    assert torch.allclose(permuted.rows(), rows[order], atol=1e-6)
    assert torch.allclose(clip.encode_texts([TEXTS[i] for i in order], batch=2), rows[order], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, len(NAMES)])
@pytest.mark.parametrize("tuned", [ALL, torch.tensor([4, 1])], ids=["all", "some"])
def test_two_passes_equal_plain_autograd(typed: FrozenClip, chunk: int, tuned: Tensor) -> None:
    dtype = typed.model.logit_scale.dtype
    draws = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(20, 32, generator=draws, dtype=dtype), dim=1)
    labels = torch.arange(20) % len(NAMES)
    prompts = moved(typed, tuned, chunk)

    rows = prompts.rows().requires_grad_()
    loss = F.cross_entropy(10 * features @ rows.T, labels)
    prompts.backward(torch.autograd.grad(loss, rows)[0])

    (learnt,) = prompts.parameters()
    leaf = learnt.detach().clone().requires_grad_()
    ids = typed.tokenizer(TEXTS)
    embedded = typed.text.embed(ids)
    contexts = embedded[:, 1:5].clone()
    contexts[tuned] = leaf
    embedded = torch.cat([embedded[:, :1], contexts, embedded[:, 5:]], dim=1)
    plain_rows = typed.text.encode(embedded, typed.text.read_position(ids))
    plain = F.cross_entropy(10 * features @ plain_rows.T, labels)
    (wanted,) = torch.autograd.grad(plain, leaf)

    assert learnt.grad is not None
    assert wanted.abs().max() > 1e-3
    assert (loss - plain).detach().abs() <= EXACT[dtype]
    assert (learnt.grad - wanted).abs().max() <= EXACT[dtype]


def test_what_a_gradient_holds_does_not_grow_with_the_classes(clip: FrozenClip) -> None:
    def most(classes: int, chunk: int) -> int:
        prompts = ClassPrompts(clip, NAMES[:2] * (classes // 2), TEMPLATE, torch.arange(classes), chunk)
        return most_held(lambda: prompts.backward(torch.ones_like(prompts.rows())))

    assert most(64, chunk=8) == most(8, chunk=8) > 0
    assert most(64, chunk=64) > 3 * most(64, chunk=8), "the count can tell"


def most_held(work: Callable[[], object]) -> int:
    """The most bytes that graphs held at a time for their way back."""
    held = [0]

    class Kept:
        """A tensor that a graph holds."""

        def __init__(self, value: Tensor) -> None:
            self.value = value
            held.append(held[-1] + value.nbytes)

        def __del__(self) -> None:
            held.append(held[-1] - self.value.nbytes)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        work()
    return max(held)


def test_gradients_add_up_as_autograds_do(clip: FrozenClip) -> None:
    prompts = moved(clip, ALL, chunk=2)
    gradient = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(2))
    prompts.backward(gradient)
    (learnt,) = prompts.parameters()
    assert learnt.grad is not None
    once = learnt.grad.clone()
    prompts.backward(gradient)
    assert torch.allclose(learnt.grad, 2 * once)


def test_classes_that_are_not_tuned_keep_their_rows_bit_for_bit(clip: FrozenClip) -> None:
    tuned = torch.tensor([1, 3])
    before = ClassPrompts(clip, NAMES, TEMPLATE, tuned).rows()
    prompts = moved(clip, tuned)
    after = prompts.rows()
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert not torch.allclose(after[tuned], before[tuned], atol=1e-3)
    assert torch.equal(prompts.state()[[0, 2, 4]], prompts.contexts[[0, 2, 4]])
    assert torch.equal(prompts.state()[tuned], prompts.parameters()[0])
    assert after.norm(dim=1).allclose(torch.ones(len(NAMES)), atol=1e-6)


def test_a_context_moves_its_own_class_only(clip: FrozenClip) -> None:
    prompts = ClassPrompts(clip, NAMES, TEMPLATE, ALL)
    before = prompts.rows()
    with torch.no_grad():
        prompts.parameters()[0][2] += 0.1 * torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    changed = (prompts.rows() - before).abs().amax(dim=1)
    assert changed[2] > 1e-3
    assert changed[[0, 1, 3, 4]].max() == 0


def test_no_weight_is_touched(clip: FrozenClip) -> None:
    before = snapshot(clip)
    prompts = moved(clip, ALL)
    prompts.backward(torch.ones(len(NAMES), 32))
    after = snapshot(clip)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.grad is None for value in clip.model.parameters())


@pytest.mark.parametrize(
    ("template", "slots"),
    [("a photo of a {}.", (1, 5)), ("a {}", (1, 2)), ("itap of the {} at night", (1, 5)), ("a photo: {}!", (1, 4))],
)
def test_context_slots_are_the_words_before_the_name(clip: FrozenClip, template: str, slots: tuple[int, int]) -> None:
    assert context_slots(clip, template) == slots


@pytest.mark.parametrize("template", ["a photo", "a {} of {}", "{}", "{} in the snow", "a {name}", "a {0} {}", ""])
def test_templates_that_cannot_be_tuned_are_refused(clip: FrozenClip, template: str) -> None:
    with pytest.raises(InputError, match="template"):
        context_slots(clip, template)
    with pytest.raises(InputError, match="template"):
        check_prompts(clip, NAMES, template)


@pytest.mark.parametrize("words", [12, 40])
def test_a_prompt_longer_than_the_context_is_refused_by_name(clip: FrozenClip, words: int) -> None:
    long = "x " * words
    with pytest.raises(InputError, match=r"'x x .*does not fit into the model's 16 tokens"):
        ClassPrompts(clip, ["cat", long], TEMPLATE, torch.arange(2))


def test_the_longest_prompt_that_is_taken_is_whole(clip: FrozenClip) -> None:
    name = " ".join("x" * 8)
    prompts = ClassPrompts(clip, ["cat", name], TEMPLATE, torch.arange(2))
    assert clip.tokenizer([TEMPLATE.replace("{}", name)])[0].count_nonzero() == 15
    assert torch.allclose(prompts.rows(), full_length(clip, ["a photo of a cat.", f"a photo of a {name}."]), atol=1e-6)
