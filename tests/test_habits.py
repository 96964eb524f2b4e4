"""The guarded classifier in the shapes that people know: streams, JSON, Hugging Face's lists, scikit-learn."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics
from sklearn.base import clone, is_classifier
from sklearn.model_selection import cross_val_score
from sklearn.utils.validation import check_is_fitted
from tiny import LABELS, SIZE

from cbpt_guard import GuardedClassifier
from cbpt_guard.decoding import in_batches, processors_here
from cbpt_guard.errors import ImageError, InputError


def colours(count: int = 40) -> list[np.ndarray]:
    """Flat pictures around the five classes' colours, none black and none that fires the rule."""
    centres = np.array([[245, 62, 62], [60, 240, 60], [60, 60, 240], [180, 180, 40], [150, 150, 150]])
    moved = centres[np.arange(count) % 5] + np.random.default_rng(1).integers(-9, 9, (count, 3))
    return list(np.broadcast_to(moved[:, None, None], (count, SIZE, SIZE, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def guard(pristine_bundle: Path) -> GuardedClassifier:
    return GuardedClassifier.load(pristine_bundle, threads=1, batch_size=4)


def test_where_no_system_tells_all_processors_count(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors_here() == os.cpu_count()
    assert GuardedClassifier.load(pristine_bundle).predict(colours(1))[0].label in LABELS


# Streams


def test_a_stream_gives_what_a_list_gives(guard: GuardedClassifier) -> None:
    images: list[Any] = [*colours(9), b"no image", *colours(6), None, "nowhere.png"]
    assert list(guard.predict_stream(iter(images))) == guard.predict(images)
    assert list(guard.predict_stream(iter([]))) == []


def test_a_stream_holds_two_batches_and_reads_nothing_ahead_of_them(guard: GuardedClassifier) -> None:
    read = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal read
        while True:  # endless
            read += 1
            yield np.full((SIZE, SIZE, 3), (0, read % 256, 0), np.uint8)

    answers = guard.predict_stream(source())
    assert read == 0
    for answered in range(1, 30):
        assert next(answers).label == "green"
        assert read <= answered + 2 * 4
    answers.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cbpt-guard-decode")]


def test_an_error_of_the_source_comes_after_the_answers_before_it(guard: GuardedClassifier) -> None:
    def source() -> Iterator[np.ndarray]:
        yield from colours(6)
        raise OSError("the queue is gone")

    answers = guard.predict_stream(source())
    assert [next(answers) for _ in range(6)] == guard.predict(colours(6))
    with pytest.raises(OSError, match="the queue is gone"):
        next(answers)


def test_the_next_batch_is_prepared_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(8)]

    def work(number: int) -> int:
        begun[number].set()
        return number

    batches = in_batches(range(8), work, batch_size=2, workers=2)
    assert next(batches) == [0, 1]
    assert all(event.wait(5) for event in begun[2:4])
    assert not begun[4].is_set()
    assert list(batches) == [[2, 3], [4, 5], [6, 7]]


def test_a_generator_is_told_where_to_go(guard: GuardedClassifier) -> None:
    with pytest.raises(ImageError, match="pass it to predict_stream"):
        guard.predict(image for image in colours(2))  # type: ignore[call-overload]


# JSON and Hugging Face


def test_an_answer_as_a_hugging_face_pipeline_gives_it(guard: GuardedClassifier) -> None:
    prediction = guard.predict(colours(2)[1])
    answers = prediction.to_hf()
    assert [set(answer) for answer in answers] == [{"label", "score"}] * len(LABELS)
    assert answers[0] == {"label": "green", "score": prediction.score}
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert json.loads(json.dumps(prediction.to_dict()))["top"] == answers
    assert guard.predict([b"no image"])[0].to_hf() == []


# scikit-learn


def labelled() -> tuple[list[np.ndarray], list[str]]:
    """Forty pictures and their classes; every eighth label is wrong, so that no score is trivial."""
    truth = [LABELS[(place % 5 + (place % 8 == 7)) % 5] for place in range(40)]
    return colours(40), truth


def test_scikit_learns_metrics_take_the_adapter(guard: GuardedClassifier) -> None:
    model, (images, truth) = guard.as_sklearn(), labelled()
    expected = float(np.mean([a.label == b for a, b in zip(guard.predict(images), truth, strict=True)]))
    assert 0.8 < expected < 1
    assert metrics.accuracy_score(truth, model.predict(images)) == model.score(images, truth) == expected
    assert metrics.get_scorer("accuracy")(model, images, truth) == expected
    assert metrics.confusion_matrix(truth, model.predict(images), labels=model.classes_).trace() == 40 * expected
    assert model.score(images, truth, sample_weight=[1.0] + [0.0] * 39) == 1.0
    assert model.score(np.stack(images), truth) == expected


def test_probabilities_have_the_order_that_metrics_assume(guard: GuardedClassifier) -> None:
    """The bundle's own order is not sorted: log_loss would take blue's column for red's and say nothing."""
    model, (images, _) = guard.as_sklearn(), labelled()
    own = [LABELS[place % 5] for place in range(40)]
    assert model.classes_.tolist() == sorted(LABELS) != guard.classes_.tolist()
    shares = guard.predict_proba(images)
    loss = -np.mean([np.log(row[LABELS.index(label)]) for row, label in zip(shares, own, strict=True)])
    assert metrics.log_loss(own, model.predict_proba(images)) == pytest.approx(loss)
    assert metrics.top_k_accuracy_score(own, model.predict_proba(images), k=1, labels=model.classes_) == 1.0


def test_scikit_learn_sees_a_fitted_classifier(guard: GuardedClassifier) -> None:
    model, (images, truth) = guard.as_sklearn(), labelled()
    assert is_classifier(model)
    check_is_fitted(model)
    assert clone(model) is model.fit(images, truth) is model
    assert model.get_params() == {"guard": guard}
    folds = cross_val_score(model, images, truth, cv=4)
    assert folds.mean() == pytest.approx(model.score(images, truth))
    assert "SklearnClassifier(GuardedClassifier(5 classes" in repr(model)


def test_the_adapter_refuses_what_has_no_score(guard: GuardedClassifier) -> None:
    model, (images, truth) = guard.as_sklearn(), labelled()
    with pytest.raises(InputError, match="40 images and 39 labels"):
        model.score(images, truth[:-1])
    with pytest.raises(InputError, match="one at least"):
        model.score([], [])
    with pytest.raises(ImageError, match="image 1: "):
        model.predict([images[0], b"no image"])


def test_the_adapter_always_names_a_class(pristine_bundle: Path) -> None:
    careful = GuardedClassifier.load(pristine_bundle, threads=1, abstain=1.0)
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (0, 200, 0)).save(buffer, "JPEG")
    assert careful.predict(buffer.getvalue()).label is None
    assert careful.as_sklearn().predict([buffer.getvalue()]).tolist() == ["green"]
