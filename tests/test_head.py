"""Heads and the rule that joins them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.head import LEFT_OUT, GuardedHead, Head, Rule, TriggerTest, apply_rule
from cbpt_guard.errors import InputError

C, E, TARGET = 5, 16, 3


def unit(purpose: str, count: int) -> Tensor:
    return F.normalize(torch.randn(count, E, generator=generator(0, purpose)), dim=1)


def head(*, suspected: bool = True, rule: Rule = "switch", bias: float = -2.5) -> GuardedHead:
    rows = unit("rows", C)
    test = TriggerTest.none(C, E)
    if suspected:
        test.directions[TARGET], test.thresholds[TARGET] = rows[TARGET], 0.3
    classes = ("apple", "naïve été", "c", "banana", "e")
    return GuardedHead(Head(rows, 100.0, bias), Head(unit("guarded", C), 100.0, bias), test, classes, rule)


def test_answers_of_many_images_come_part_by_part() -> None:
    features = F.normalize(torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    head = Head(torch.eye(6), 10.0)
    assert torch.equal(head.answers(features), head.logits(features).argmax(1))
    assert head.answers(features[:0]).shape == (0,)


def test_a_head_that_suspects_nothing_answers_bit_for_bit_as_before() -> None:
    features, guarded = unit("images", 300), head(suspected=False)
    answer = guarded.answer(features)
    assert torch.equal(answer.logits, guarded.original.logits(features))
    assert torch.equal(answer.logits, answer.original)
    assert not answer.triggered.any()
    assert guarded.suspects == []


def test_the_flag_needs_the_target_and_its_side_of_the_threshold() -> None:
    guarded, features = head(), unit("images", 3000)
    answer = guarded.answer(features)
    far = features @ guarded.original.rows[TARGET] > 0.3
    is_target = answer.original.argmax(1) == TARGET
    assert torch.equal(answer.triggered, far & is_target)
    for kind in (far & is_target, far & ~is_target, ~far & is_target):
        assert kind.any(), "every kind of image is among them"
    assert guarded.suspects == [TARGET]


def test_a_class_leads_by_what_the_best_other_one_lacks() -> None:
    leads = Head(torch.eye(3), 10.0, bias=4.0).leads(torch.tensor([[0.6, 0.8, 0.0], [0.6, 0.6, -0.5]]))
    torch.testing.assert_close(leads, torch.tensor([[-2.0, 2.0, -8.0], [0.0, 0.0, -11.0]]))


def test_what_an_attacker_misses_counts_the_test_under_the_switch_alone() -> None:
    guarded, features = head(), unit("images", 300)
    wanted = guarded.original.answers(features)
    past = (features @ guarded.original.rows[TARGET] - 0.3).clamp(min=0) * (wanted == TARGET)
    assert (past > 0).any()
    alone = F.cross_entropy(guarded.original.logits(features), wanted, reduction="none")
    torch.testing.assert_close(guarded.original.missing(features, wanted), alone)
    torch.testing.assert_close(guarded.missing(features, wanted), alone + 100.0 * past)
    prompts = guarded.with_rule("prompts")
    torch.testing.assert_close(prompts.missing(features, wanted), guarded.guarded.missing(features, wanted))
    assert torch.equal(guarded.answers(features), guarded.answer(features).logits.argmax(1))
    assert (guarded.answers(features) != wanted)[past > 0].all()


def test_a_triggered_image_never_gets_the_class_left_out() -> None:
    guarded = head()
    answer = guarded.answer(unit("images", 3000))
    flagged = answer.logits[answer.triggered]
    assert len(flagged) > 20
    assert (flagged.argmax(1) != TARGET).all()
    assert (flagged[:, TARGET] == LEFT_OUT).all()
    assert (flagged.softmax(1)[:, TARGET] == 0).all()
    assert torch.isfinite(flagged.half()).all()
    assert torch.equal(answer.logits[~answer.triggered], answer.original[~answer.triggered])
    others = [c for c in range(C) if c != TARGET]
    guarded_logits = guarded.guarded.logits(unit("images", 3000))[answer.triggered]
    assert (guarded_logits.argmax(1) == TARGET).any(), "leaving the class out decides something"
    assert torch.equal(flagged[:, others], guarded_logits[:, others])


def test_prompts_answers_everything_from_the_guarded_head() -> None:
    guarded, features = head(rule="prompts"), unit("images", 3000)
    answer = guarded.answer(features)
    assert torch.equal(answer.logits, guarded.guarded.logits(features))
    assert torch.equal(answer.triggered, guarded.with_rule("switch").answer(features).triggered)
    assert answer.triggered.any()


def test_prompts_answers_from_the_tuned_prompts_where_the_guarded_head_is_another(tmp_path: Path) -> None:
    prompts, features = Head(unit("prompts", C), 100.0, -2.5), unit("images", 300)
    both = replace(head(), prompts=prompts)
    assert torch.equal(both.answer(features).logits, head().answer(features).logits)
    both.save(tmp_path / "heads")
    for one in (both, GuardedHead.load(tmp_path / "heads")):
        paper = one.with_rule("prompts")
        assert torch.equal(paper.answer(features).logits, prompts.logits(features))
        paper.save(tmp_path / "paper")
        assert torch.equal(GuardedHead.load(tmp_path / "paper").guarded.rows, prompts.rows)


def test_on_a_tie_the_first_class_counts() -> None:
    original = torch.tensor([[7.0, 7.0, 1.0], [1.0, 7.0, 7.0]])
    guarded = torch.tensor([[9.0, 2.0, 3.0], [2.0, 9.0, 3.0]])
    logits = apply_rule(original, guarded, torch.tensor([True, True]), "switch")
    assert torch.equal(logits, torch.tensor([[LEFT_OUT, 2.0, 3.0], [2.0, LEFT_OUT, 3.0]]))
    rows = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    test = TriggerTest.none(3, 2)
    test.directions[1], test.thresholds[1] = rows[1], 0.5
    tied = GuardedHead(Head(rows, 10.0), Head(rows, 10.0), test, ("a", "b", "c"))
    assert not tied.answer(rows[:1]).triggered.any(), "class 0 answers, and it is not suspected"


def test_the_threshold_itself_is_not_above() -> None:
    test = TriggerTest(torch.eye(2), torch.tensor([0.5, 0.5]))
    features = torch.tensor([[0.5, 0.0], [0.5 + 1e-6, 0.0]])
    assert test.fires(features, torch.zeros(2, dtype=torch.long)).tolist() == [False, True]


@pytest.mark.parametrize("classes", [2, 3])
def test_two_classes_leave_one_answer(classes: int) -> None:
    rows = torch.eye(classes)
    guarded = GuardedHead(
        Head(rows, 1.0), Head(rows, 1.0), TriggerTest(rows, torch.full((classes,), 0.5)), tuple("abc"[:classes])
    )
    answer = guarded.answer(rows)
    assert answer.triggered.all()
    assert (answer.logits.argmax(1) != torch.arange(classes)).all()


def test_an_empty_batch_is_answered() -> None:
    answer = head().answer(torch.zeros(0, E))
    assert answer.logits.shape == (0, C)
    assert answer.triggered.shape == (0,)


@pytest.mark.parametrize("rule", ["switch", "prompts"])
def test_heads_survive_their_file_bit_for_bit(tmp_path: Path, rule: Rule) -> None:
    saved, features = head(rule=rule), unit("images", 500)
    saved.save(tmp_path / "heads.safetensors")
    read = GuardedHead.load(tmp_path / "heads.safetensors")
    assert (read.classes, read.rule, read.suspects) == (saved.classes, rule, [TARGET])
    before, after = saved.answer(features), read.answer(features)
    for one, two in ((before.logits, after.logits), (before.triggered, after.triggered)):
        assert torch.equal(one, two)


def test_equal_heads_are_equal_bytes(tmp_path: Path) -> None:
    for number in range(8):  # an order drawn anew each time would show
        head().save(tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, object]], object]) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["head"])
    text = change(tensors, about)
    save_file(tensors, path, {"head": text if isinstance(text, str) else json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.pop("thresholds"),
        lambda tensors, about: tensors.update(thresholds=torch.zeros(C - 1)),
        lambda tensors, about: tensors.update(guarded_rows=torch.zeros(C + 1, E)),
        lambda tensors, about: tensors.update(prompt_rows=torch.zeros(C + 1, E)),
        lambda tensors, about: tensors.update(scale=torch.zeros(2)),
        lambda tensors, about: about.update(other=about.pop("classes")),
        lambda tensors, about: "no json",
        lambda tensors, about: about.update(classes=["a"]),
        lambda tensors, about: about.update(classes=3),
        lambda tensors, about: about.update(rule="swich"),
        lambda tensors, about: about.clear(),
    ],
    ids=["no thresholds", "few thresholds", "many rows", "many prompts", "two scales", "no classes", "no json",
         "few classes", "a number", "unknown rule", "nothing said"],
)  # fmt: skip
def test_a_malformed_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, object]], object]
) -> None:
    path = tmp_path / "heads.safetensors"
    head().save(path)
    rewritten(path, change)
    with pytest.raises(InputError, match=r"heads\.safetensors is no heads file"):
        GuardedHead.load(path)


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "heads.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"heads\.safetensors is no heads file"):
        GuardedHead.load(path)
