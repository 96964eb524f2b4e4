"""A run becomes a bundle whose ONNX file answers as torch does, or it becomes nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import small_clips
import torch
from small_runs import CLASSES, TARGET, write_run

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import load_golden, open_bundle
from cbpt_guard.defense.clip import ImageEncoder
from cbpt_guard.defense.found import Family, FoundTrigger, TriggerBank
from cbpt_guard.defense.head import LEFT_OUT, GuardedHead, Head, TriggerTest
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export import export, gate, golden, graph, parity, write
from cbpt_guard.export import sbom as sbom_module
from cbpt_guard.export.card import escaped
from cbpt_guard.export.parts import Parts, read_parts
from cbpt_guard.images import Preprocess
from cbpt_guard.manifest import Gate
from cbpt_guard.session import Outputs, Session


def session_of(parts: Parts, opset: int = 18) -> Session:
    size = parts.images.shape[1]
    return Session(graph.to_onnx(parts.graph, size, opset), size=size, classes=len(CLASSES), threads=1)


@pytest.fixture(scope="module")
def parts(tiny_run: Path) -> Parts:
    return read_parts(PurifyRun.open(tiny_run))


@pytest.fixture(scope="module")
def session(exported: Path) -> Session:
    return Session((exported / "model.onnx").read_bytes(), size=32, classes=len(CLASSES), threads=1)


@pytest.fixture
def quick(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`export` that takes the small run's graph from the shelf instead of tracing it again."""
    model = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(write, "to_onnx", lambda *_: model)
    return export


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attacked(parts: Parts) -> np.ndarray:
    return gate.triggered(parts.images, next(iter(parts.bank)))


# The graph


def same(found: Outputs, wanted: Outputs, bound: float = 1e-3) -> None:
    assert np.abs(found.logits - wanted.logits).max() < bound
    assert np.abs(found.logits_original - wanted.logits_original).max() < bound
    assert np.abs(found.embedding - wanted.embedding).max() < 1e-5
    assert np.array_equal(found.triggered, wanted.triggered)


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_onnx_answers_as_torch_in_every_batch(parts: Parts, session: Session, batch: int) -> None:
    images = np.concatenate([parts.images[:20], attacked(parts)[:20]])
    wanted = parity.torch_outputs(parts.graph, images)
    assert 0 < wanted.triggered.sum() < 40
    same(session.run(images, batch), wanted)


def test_the_switch_leaves_the_target_out_and_every_other_image_untouched(parts: Parts, session: Session) -> None:
    outputs = session.run(np.concatenate([parts.images, attacked(parts)]))
    fired = outputs.triggered
    assert fired.sum() > 30
    assert (outputs.logits[fired, TARGET] == LEFT_OUT).all()
    assert np.array_equal(outputs.logits[~fired], outputs.logits_original[~fired])


def test_nothing_suspected_changes_no_bit_at_a_higher_opset_either(parts: Parts) -> None:
    head = parts.graph.head
    innocent = graph.GuardedGraph(parts.graph.encoder, replace(head, test=TriggerTest.none(*head.original.rows.shape)))
    outputs = session_of(replace(parts, graph=innocent), opset=23).run(attacked(parts))
    same(outputs, parity.torch_outputs(innocent, attacked(parts)))
    assert not outputs.triggered.any()
    assert np.array_equal(outputs.logits, outputs.logits_original)


def test_a_resnet_by_the_papers_rule_and_a_silent_exporter(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    parts = read_parts(PurifyRun.open(write_run(tmp_path / "run", small_clips.RESNET, rule="prompts")))
    levels = [logging.getLogger(name).level for name in graph._NOISY]
    capfd.readouterr()
    session = session_of(parts)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert [logging.getLogger(name).level for name in graph._NOISY] == levels
    assert parity.measure_parity(parts.graph, session, parts.images).max_logit_difference < 1e-3
    outputs = session.run(attacked(parts))
    same(outputs, parity.torch_outputs(parts.graph, attacked(parts)))
    assert outputs.triggered.any()
    assert (outputs.logits != outputs.logits_original).any(axis=1).all()


def test_no_trace_of_this_machine(exported: Path, tiny_run: Path) -> None:
    secrets = [
        str(Path.home()),
        str(Path.cwd()),
        sys.prefix,
        str(tiny_run),
        str(exported.parent),
        ".py\x22",
        ".py:",
    ]
    for name, data in contents(exported).items():
        found = [secret for secret in secrets if secret.encode() in data]
        assert not found, (name, found)
    model = onnx.load(exported / "model.onnx")
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("opset", [17, 26, 99])
def test_opset_out_of_range(tiny_run: Path, tmp_path: Path, opset: int) -> None:
    with pytest.raises(InputError, match="18 to 25"):
        export(tiny_run, tmp_path / "bundle", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_too_large_for_one_file(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_ONE_FILE", 1000)
    with pytest.raises(InputError, match="one ONNX file holds at most 2 GB"):
        graph.to_onnx(parts.graph, 32, 18)


def test_an_architecture_that_the_exporter_cannot_express(parts: Parts) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    encoder = ImageEncoder(Odd(), Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    with pytest.raises(CheckError, match="cannot be exported"):
        graph.to_onnx(graph.GuardedGraph(encoder, parts.graph.head), 32, 18)


# Parity and gate


class Fixed:
    """A session whose answers for these images are torch's own, but for one flag."""

    def __init__(self, answers: Outputs, images: np.ndarray, image: int, flag: bool) -> None:
        self.answers = answers._replace(triggered=answers.triggered.copy())
        self.answers.triggered[image] = flag
        self.numbers = {pixels.tobytes(): number for number, pixels in enumerate(images)}

    def run(self, pixels: np.ndarray, batch: int) -> Outputs:
        numbers = [self.numbers[one.tobytes()] for one in pixels]
        return Outputs(*(column[numbers] for column in self.answers))


def test_parity_sees_a_wrong_weight(parts: Parts, session: Session) -> None:
    head = parts.graph.head
    wrong = replace(head, guarded=replace(head.guarded, scale=head.guarded.scale * 1.001))
    images = np.concatenate([parts.images, attacked(parts)])
    with pytest.raises(CheckError, match=r"differs from torch by 0\.\d+ logits"):
        parity.measure_parity(graph.GuardedGraph(parts.graph.encoder, wrong), session, images)


def test_an_export_compares_what_flagged_images_are_answered(
    tiny_run: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clean image of this run is flagged, so no clean one shows that the guarded rows are others."""
    head = parts.graph.head
    assert not parity.torch_outputs(parts.graph, parts.images).triggered.any()
    other = replace(head, guarded=replace(head.guarded, rows=head.guarded.rows.roll(1, 0)))
    model = graph.to_onnx(graph.GuardedGraph(parts.graph.encoder, other), 32, 18)
    monkeypatch.setattr(write, "to_onnx", lambda *_: model)
    with pytest.raises(CheckError, match=r"differs from torch by \d+\.?\d* logits"):
        export(tiny_run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_parity_looks_at_images_from_all_over_in_other_batches(parts: Parts, session: Session) -> None:
    class Watched:
        def __init__(self) -> None:
            self.seen: dict[int, np.ndarray] = {}

        def run(self, pixels: np.ndarray, batch: int) -> Outputs:
            self.seen[batch] = pixels
            return session.run(pixels, batch)

    watched, images = Watched(), gate.with_triggered(parts.images, parts.bank)
    parity.measure_parity(parts.graph, watched, images)  # type: ignore[arg-type]
    for batch in (1, 2, 5):
        assert len(watched.seen[batch]) == 10
        assert np.array_equal(watched.seen[batch][0], images[0])
        assert np.array_equal(watched.seen[batch][-1], images[-1])


def test_parity_lets_an_image_at_the_threshold_fall_to_either_side(parts: Parts) -> None:
    head, images = parts.graph.head, attacked(parts)
    wanted = parity.torch_outputs(parts.graph, images)
    first = int(wanted.triggered.argmax())
    thresholds = head.test.thresholds.clone()
    thresholds[TARGET] = torch.from_numpy(wanted.embedding[first]) @ head.test.directions[TARGET]
    edge = replace(head, test=TriggerTest(head.test.directions, thresholds))
    module = graph.GuardedGraph(parts.graph.encoder, edge)
    answers = parity.torch_outputs(module, images)
    fires, silent = Fixed(answers, images, first, True), Fixed(answers, images, first, False)
    for session in (fires, silent):
        assert parity.measure_parity(module, session, images).max_logit_difference == 0  # type: ignore[arg-type]
    elsewhere = Fixed(answers, images, (first + 1) % 40, not answers.triggered[(first + 1) % 40])
    with pytest.raises(CheckError, match="flags differ"):
        parity.measure_parity(module, elsewhere, images)  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "refused"), [(1.0, False), (2.0, True)])
def test_an_embedding_error_costs_what_the_longest_row_makes_of_it(parts: Parts, length: float, refused: bool) -> None:
    head = parts.graph.head
    rows = torch.nn.functional.normalize(head.guarded.rows, dim=1)
    rows[0] *= length
    module = graph.GuardedGraph(parts.graph.encoder, replace(head, guarded=replace(head.guarded, rows=rows)))
    answers = parity.torch_outputs(module, parts.images)
    error = np.zeros_like(answers.embedding)
    error[:, 0] = 0.7 * parity.parity_bound(head) / head.original.scale
    wrong = answers._replace(embedding=answers.embedding + error)
    session = Fixed(wrong, parts.images, 0, bool(answers.triggered[0]))
    with pytest.raises(CheckError, match="through its embedding") if refused else nullcontext():
        parity.measure_parity(module, session, parts.images)  # type: ignore[arg-type]


def test_slack_promises_that_smaller_errors_change_no_decision(parts: Parts) -> None:
    head = parts.graph.head
    wanted = parity.torch_outputs(parts.graph, np.concatenate([parts.images, attacked(parts)]))
    slack = parity.decision_slack(head, wanted.embedding) / head.original.scale
    generator = np.random.default_rng(0)
    for _ in range(50):
        error = generator.normal(size=wanted.embedding.shape)
        error *= 0.99 * slack[:, None] / np.linalg.norm(error, axis=1, keepdims=True)
        moved = head.answer(torch.from_numpy((wanted.embedding + error).astype(np.float32)))
        assert np.array_equal(moved.triggered.numpy(), wanted.triggered)
        assert np.array_equal(moved.original.numpy().argmax(1), wanted.logits_original.argmax(1))


def test_over_the_bound_nothing_is_written_and_the_earlier_bundle_stays(
    tiny_run: Path, tmp_path: Path, quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quick(tiny_run, tmp_path / "bundle")
    before = contents(out)
    monkeypatch.setattr(parity, "RELATIVE_BOUND", 1e-12)
    with pytest.raises(CheckError, match="differs from torch"):
        quick(tiny_run, out, force=True)
    assert contents(out) == before
    with pytest.raises(CheckError, match="differs from torch"):
        quick(tiny_run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_gate_counts_what_torch_counts(parts: Parts, session: Session) -> None:
    measured = gate.measure_gate(gate.answer_all(session, parts.images, parts.labels, parts.bank), parts.labels)
    clean = parity.torch_outputs(parts.graph, parts.images)
    under = parity.torch_outputs(parts.graph, attacked(parts)[parts.labels != TARGET])
    assert measured.gate.clean_accuracy == (clean.logits.argmax(1) == parts.labels).mean()
    assert measured.gate.clean_accuracy_original == 1.0
    assert measured.gate.found_trigger_asr == (under.logits.argmax(1) == TARGET).mean()
    assert (under.logits_original.argmax(1) == TARGET).mean() > 0.9
    assert measured.flagged_clean == clean.triggered.mean()
    assert measured.flagged_found == under.triggered.mean() > 0.9


def test_the_gate_sees_an_undefended_head(parts: Parts, session: Session) -> None:
    class Undefended:
        def run(self, pixels: np.ndarray) -> Outputs:
            outputs = session.run(pixels)
            return outputs._replace(logits=outputs.logits_original)

    answers = gate.answer_all(Undefended(), parts.images, parts.labels, parts.bank)  # type: ignore[arg-type]
    measured = gate.measure_gate(answers, parts.labels)
    with pytest.raises(CheckError, match="found-trigger ASR"):
        gate.check_gate(measured.gate, VerdictSettings())


def picking(answers: list[int], flagged: list[bool]) -> Outputs:
    """A graph's outputs that answer so; the zero-shot head always says the target."""
    logits, original = np.eye(len(CLASSES), dtype=np.float32)[[answers, [TARGET] * len(answers)]]
    return Outputs(logits, np.array(flagged), original, np.zeros((len(answers), 4), np.float32))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_gate_tells_the_trigger_that_gets_through_most(order: tuple[int, int]) -> None:
    labels = np.array([0, 1, 2, 3])
    trigger = FoundTrigger("masked", TARGET, torch.zeros(3, 2, 2), torch.zeros(1, 2, 2))
    held = picking([0, 1, 3], [True] * 3)
    missed = picking([0, TARGET, TARGET], [True, False, False])
    under = tuple((trigger, (held, missed)[number]) for number in order)
    measured = gate.measure_gate(gate.Answers(picking([0, 1, 2, 2], [False] * 4), under), labels)
    assert measured.gate.found_trigger_asr == 2 / 3
    assert measured.flagged_found == 1 / 3
    assert (measured.gate.clean_accuracy, measured.gate.clean_accuracy_original) == (0.75, 0.25)


def test_triggered_images_are_rounded_as_a_file_would_hold_them() -> None:
    trigger = FoundTrigger("masked", TARGET, torch.full((3, 2, 2), 0.5), torch.ones(1, 2, 2))
    assert (gate.triggered(np.zeros((1, 2, 2, 3), np.uint8), trigger) == 128).all()


def test_the_gate_sees_lost_accuracy() -> None:
    lost = Gate(images=90, clean_accuracy=0.5, clean_accuracy_original=0.6, found_trigger_asr=None)
    with pytest.raises(CheckError, match=r"loses 10\.0% of clean accuracy"):
        gate.check_gate(lost, VerdictSettings())


def test_what_one_image_costs_passes_the_gate_as_it_passes_the_verdict() -> None:
    """With 30 images one is 3.3 points: a run that lost one was *guarded*, and could not be exported."""
    kept = Gate(images=30, clean_accuracy=28 / 30, clean_accuracy_original=29 / 30, found_trigger_asr=None)
    gate.check_gate(kept, VerdictSettings())
    with pytest.raises(CheckError, match="clean accuracy"):
        gate.check_gate(kept.model_copy(update={"clean_accuracy": 27 / 30}), VerdictSettings())


def test_a_loss_of_just_the_bound_passes_the_gate() -> None:
    """0.54 - 0.52 is above 0.02 in floating point."""
    kept = Gate(images=100, clean_accuracy=0.52, clean_accuracy_original=0.54, found_trigger_asr=None)
    assert kept.clean_accuracy_original - kept.clean_accuracy > VerdictSettings().accuracy_loss
    gate.check_gate(kept, VerdictSettings())


@pytest.mark.parametrize("wrong", [1, 2, 5])
def test_a_graph_that_is_wrong_in_one_batch_size_alone_is_found(parts: Parts, session: Session, wrong: int) -> None:
    class Odd:
        def run(self, pixels: np.ndarray, batch: int = 128) -> Outputs:
            outputs = session.run(pixels, batch)
            return outputs._replace(logits=outputs.logits + (batch == wrong))

    with pytest.raises(CheckError, match="differs from torch"):
        parity.measure_parity(parts.graph, Odd(), parts.images)  # type: ignore[arg-type]


def test_a_run_that_fails_its_gate_is_refused_unless_allowed(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path]
) -> None:
    samples = dict(np.load(own_run / "samples.npz"))
    record = json.loads((own_run / "run.json").read_text())
    record["settings"]["verdict"]["accuracy_loss"] = 0.0
    (own_run / "run.json").write_text(json.dumps(record))
    parts = read_parts(PurifyRun.open(own_run))
    samples["images"] = np.concatenate([samples["images"], attacked(parts)])
    samples["labels"] = np.concatenate([samples["labels"], np.full(len(attacked(parts)), TARGET)])
    np.savez(own_run / "samples.npz", **samples)
    with pytest.raises(CheckError, match="does not pass its gate"):
        quick(own_run, tmp_path / "bundle")
    manifest = open_bundle(quick(own_run, tmp_path / "bundle", allow_unguarded=True)).manifest
    assert manifest.allow_unguarded
    assert manifest.variants["fp32"].gate.clean_accuracy < 0.8
    assert manifest.verdict == "not guarded"
    assert "the ONNX file does not pass its gate: it loses" in manifest.reasons[0]


def test_a_run_that_suspects_nothing_stays_unverified_though_its_triggers_work(tmp_path: Path) -> None:
    """Such a run's triggers aim at the likeliest class, which no test guards: they say nothing against its verdict."""
    run = write_run(tmp_path / "run", suspected=False, verdict="unverified")
    bundle = export(run, tmp_path / "bundle", allow_unguarded=True)
    manifest = open_bundle(bundle).manifest
    asr = manifest.variants["fp32"].gate.found_trigger_asr
    assert asr is not None
    assert asr > 0.9
    assert (manifest.verdict, manifest.reasons) == ("unverified", ("ASR 40 % > 5 %",))
    assert not load_golden((bundle / "golden.npz").read_bytes()).triggered.any()


# The recipe


def test_the_bundle_is_complete_and_served(exported: Path, parts: Parts) -> None:
    assert set(contents(exported)) == {
        *("manifest.json", "model.onnx", "labels.json", "golden.npz", "prompts.safetensors", "README.md"),
        "sbom.cdx.json",
    }
    guard = GuardedClassifier.load(exported, threads=1)
    assert tuple(guard.classes_) == CLASSES
    clean, hit = guard.predict([parts.images[0], attacked(parts)[0]])
    assert (clean.index, clean.triggered, clean.changed) == (int(parts.labels[0]), False, False)
    assert (hit.triggered, hit.changed) == (True, True)
    assert hit.index != TARGET


def test_the_manifest_says_where_it_comes_from(exported: Path, tiny_run: Path) -> None:
    manifest, record = open_bundle(exported).manifest, PurifyRun.open(tiny_run).record
    assert manifest.verdict == "guarded"
    assert not manifest.allow_unguarded
    assert manifest.model.source_sha256 == record.model.source_sha256
    assert manifest.rule.suspects == record.suspects
    assert manifest.settings == {"seed": record.seed, "template": record.template, **record.settings}
    assert set(manifest.tools) == {
        *("python", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")
    }
    found = manifest.variants["fp32"].parity
    assert 0 < found.max_logit_difference <= found.bound == 5e-3
    assert manifest.golden_tolerance == 10 * found.bound, "at twice that half precision would pass for float32"


def test_golden_inputs_are_drawn_not_taken_and_keep_their_distance(exported: Path, parts: Parts) -> None:
    golden = load_golden((exported / "golden.npz").read_bytes())
    slack = parity.decision_slack(parts.graph.head, parity.torch_outputs(parts.graph, golden.images).embedding)
    assert len(golden.images) == 4
    assert (slack > open_bundle(exported).manifest.golden_tolerance).all()


def test_of_flagged_pictures_each_suspected_class_comes_before_a_second_of_one(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.eye(5, dtype=np.float32)[[1, 1, 2, 1, 3]]
    answers = Outputs(logits, np.array([True, True, True, True, False]), logits, np.zeros((5, 4), np.float32))
    monkeypatch.setattr(golden, "decision_slack", lambda *_: np.array([9, 8, 7, 0.0, 9], np.float32))
    session, pictures = SimpleNamespace(run=lambda _: answers), np.arange(5, dtype=np.uint8)
    ordered = golden._clearest(session, parts.graph.head, pictures, 0.1, flagged=True)  # type: ignore[arg-type]
    assert ordered.tolist() == [0, 2, 1]


def test_the_self_test_sees_a_runtime_on_which_the_test_never_fires(exported: Path, parts: Parts) -> None:
    golden = load_golden((exported / "golden.npz").read_bytes())
    assert golden.triggered.tolist() == [True, True, False, False]
    head = parts.graph.head
    for never in (torch.full_like(head.test.thresholds, torch.inf), head.test.thresholds + 10):
        blind = replace(head, test=replace(head.test, thresholds=never))
        answers = parity.torch_outputs(graph.GuardedGraph(parts.graph.encoder, blind), golden.images)
        assert not np.array_equal(answers.triggered, golden.triggered)
        assert np.abs(answers.logits - golden.logits).max() > open_bundle(exported).manifest.golden_tolerance


def test_an_unguarded_run_is_refused_and_recorded_when_allowed(tmp_path: Path, quick: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run", verdict="not guarded")
    with pytest.raises(CheckError, match=r"not guarded \(ASR 40 % > 5 %\).*--allow-unguarded"):
        quick(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    bundle = quick(run, tmp_path / "bundle", allow_unguarded=True)
    manifest = open_bundle(bundle).manifest
    assert (manifest.verdict, manifest.allow_unguarded) == ("not guarded", True)
    assert manifest.reasons == ("ASR 40 % > 5 %",)
    assert "**Verdict: not guarded.**\n- ASR 40 %" in (bundle / "README.md").read_text()


def test_an_existing_bundle_is_replaced_by_force_only(
    tiny_run: Path, tmp_path: Path, quick: Callable[..., Path]
) -> None:
    out = quick(PurifyRun.open(tiny_run), tmp_path / "bundle")
    (out / "stray.txt").write_text("x")
    with pytest.raises(InputError, match="--force"):
        quick(tiny_run, out)
    quick(tiny_run, out, force=True)
    assert open_bundle(out).labels == CLASSES


def test_force_never_replaces_the_run_or_a_strangers_folder(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path]
) -> None:
    before = contents(own_run)
    for out in (own_run, tmp_path):
        with pytest.raises(InputError, match="holds the run"):
            quick(own_run, out, force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(InputError, match="is no bundle"):
        quick(own_run, tmp_path / "photos", force=True)
    assert contents(own_run) == before
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_an_interrupted_export_leaves_nothing_and_starts_over(
    tiny_run: Path, tmp_path: Path, quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(tiny_run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".bundle.partial").mkdir()  # what a killed export leaves
    (tmp_path / ".bundle.partial" / "left-over").write_text("x")
    assert open_bundle(quick(tiny_run, tmp_path / "bundle")).labels == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "name",
    [
        "heads.safetensors",
        "metrics.json",
        "model.safetensors",
        "prompts.safetensors",
        "run.json",
        "samples.npz",
        "triggers.safetensors",
    ],
)
def test_a_run_with_a_missing_or_broken_file_is_refused(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path], name: str
) -> None:
    data = (own_run / name).read_bytes()
    (own_run / name).unlink()
    with pytest.raises(InputError, match=name):
        quick(own_run, tmp_path / "bundle")
    if name != "prompts.safetensors":  # it is carried along, not read
        (own_run / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=name):
            quick(own_run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bank_of_every_family_is_exported_and_one_of_other_shapes_refused(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path]
) -> None:
    """Beside the run's own: one of each other family that changes next to nothing, so that the gate stays content."""
    path, size = own_run / "triggers.safetensors", 32
    own = TriggerBank.load(path).triggers
    still = torch.cat([torch.ones(3, size, size), torch.zeros(3, size, size)])
    same = torch.eye(3)[..., None, None]
    patterns: dict[Family, torch.Tensor] = {"wave": still[3:], "warp": still[4:], "tint": still, "kernel": same}
    bank = (*own, *(FoundTrigger(family, own[0].target, pattern.clone(), None) for family, pattern in patterns.items()))
    TriggerBank(bank).save(path)
    quick(own_run, tmp_path / "bundle")
    for family in patterns:
        TriggerBank((FoundTrigger(family, own[0].target, torch.zeros(5, size, size), None),)).save(path)
        with pytest.raises(InputError, match="another image size"):
            quick(own_run, tmp_path / "other")


def test_samples_that_a_power_loss_emptied(own_run: Path, tmp_path: Path, quick: Callable[..., Path]) -> None:
    (own_run / "samples.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"samples\.npz is missing or malformed"):
        quick(own_run, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("heads.safetensors", "run.json"),
        ("model.safetensors", "does not fit its architecture"),
        ("samples.npz", r"\(N, 32, 32, 3\)"),
    ],
)
def test_pieces_of_another_run_do_not_fit(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path], other: str, named: str
) -> None:
    stranger = write_run(tmp_path / "stranger", small_clips.RESNET, suspected=False)
    (own_run / other).write_bytes((stranger / other).read_bytes())
    with pytest.raises(InputError, match=named):
        quick(own_run, tmp_path / "bundle")


def test_heads_of_another_rule_or_shape_do_not_fit(own_run: Path, tmp_path: Path, quick: Callable[..., Path]) -> None:
    head = GuardedHead.load(own_run / "heads.safetensors")
    replace(head, rule="prompts").save(own_run / "heads.safetensors")
    with pytest.raises(InputError, match="another rule or other suspects"):
        quick(own_run, tmp_path / "bundle")
    narrow = Head(head.guarded.rows[:, 1:], head.guarded.scale)
    replace(head, guarded=narrow).save(own_run / "heads.safetensors")
    with pytest.raises(InputError, match="does not hold heads of 5 classes"):
        quick(own_run, tmp_path / "bundle")


def test_progress_is_told(tiny_run: Path, tmp_path: Path, quick: Callable[..., Path]) -> None:
    told: list[str] = []
    quick(tiny_run, tmp_path / "bundle", progress=told.append)
    assert told[0] == "reading the run"
    assert "comparing it with torch on 56 images" in told, "40, and 16 of them once more under the found trigger"


def test_the_card_shows_names_as_they_are(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert r"apple, \*bold\* \| \[pipe\]\(x\), banana, dog, naïve été" in text
    assert escaped("a\n# b\u202e<script>") == r"a \# b \<script\>"


def test_the_card_tells_where_nothing_was_held_out(
    own_run: Path, tmp_path: Path, quick: Callable[..., Path], exported: Path
) -> None:
    assert "| on 40 held-out images | value |" in (exported / "README.md").read_text()
    metrics = json.loads((own_run / "metrics.json").read_text()) | {"held_out": False}
    (own_run / "metrics.json").write_text(json.dumps(metrics))
    card = (quick(own_run, tmp_path / "bundle") / "README.md").read_text()
    assert "| on 40 images that were tuned on (none was held out) | value |" in card
    assert "held-out" not in card


def test_a_bundle_lists_the_build_of_onnxruntime_that_made_it(
    tiny_run: Path, tmp_path: Path, quick: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (write, sbom_module):
        monkeypatch.setattr(module, "builds_here", lambda: {"onnxruntime-gpu": "1.20.0"})
    bundle = quick(tiny_run, tmp_path / "bundle")
    tools = open_bundle(bundle).manifest.tools
    assert tools["onnxruntime-gpu"] == "1.20.0"
    assert "onnxruntime" not in tools
    listed = json.loads((bundle / "sbom.cdx.json").read_text())["components"]
    assert "onnxruntime-gpu" in {one["name"] for one in listed}


def test_verifying_needs_no_torch(exported: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'open_clip', 'onnx'): sys.modules[name] = None\n"
        "from cbpt_guard.export import verify\n"
        "print(len(verify(sys.argv[1]).checks))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr
