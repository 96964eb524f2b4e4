"""The runtime: a bundle answers for images, with numpy, Pillow and onnxruntime alone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from cbpt_guard.bundle import GOLDEN, Golden, OpenedBundle, load_golden, open_bundle
from cbpt_guard.decoding import decoders_here, in_batches
from cbpt_guard.errors import BundleError, CheckError, ImageError, InputError
from cbpt_guard.estimator import SklearnClassifier
from cbpt_guard.images import DEFAULT_LIMITS, ImageLimits, ImageSource, Pixels, load_image, prepare
from cbpt_guard.manifest import Manifest
from cbpt_guard.prediction import Prediction, softmax
from cbpt_guard.session import Outputs, Session

__all__ = ["GuardedClassifier", "Prediction"]

Source = TypeVar("Source", bound=ImageSource)
_NOT_FINITE = "the graph answered with numbers that are not finite"


class GuardedClassifier:
    """A purified zero-shot classifier; thread-safe. Load it after forking, in each process."""

    def __init__(
        self,
        bundle: OpenedBundle,
        session: Session,
        *,
        batch_size: int = 32,
        decoders: int | None = None,
        abstain: float | None = None,
        top: int = 5,
        limits: ImageLimits = DEFAULT_LIMITS,
        tolerance: float | None = None,
    ) -> None:
        decoders = decoders_here() if decoders is None else decoders
        if batch_size < 1 or top < 1 or decoders < 1:
            raise InputError("batch_size, decoders and top must be 1 or more")
        if abstain is not None and not 0 <= abstain <= 1:
            raise InputError(f"abstain is a score between 0 and 1, not {abstain}")
        self.digest = bundle.digest
        self.manifest: Manifest = bundle.manifest
        self.classes_: npt.NDArray[np.str_] = np.array(bundle.labels)
        self._labels = bundle.labels
        self._session = session
        self._batch_size = batch_size
        self._decoders = decoders
        self._abstain = abstain
        self._top = top
        self._tolerance = bundle.manifest.golden_tolerance if tolerance is None else tolerance
        self._limits = limits

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        providers: str | Sequence[str] | None = None,
        digest: str | None = None,
        threads: int | None = None,
        spin: bool = False,
        arena: bool = True,
        batch_size: int = 32,
        decoders: int | None = None,
        precision: str = "fp32",
        abstain: float | None = None,
        top: int = 5,
        limits: ImageLimits = DEFAULT_LIMITS,
        check: bool = True,
    ) -> GuardedClassifier:
        """Open a bundle, check every file of it, and run its self-test.

        Args:
            path: the bundle's folder.
            providers: where it runs, by name and in order ("cpu", "cuda", "tensorrt", ...); None is the CPU.
            digest: "sha256:..." of the manifest.json that it must be; pins the bundle from outside.
            threads: onnxruntime's threads within one run; None is one for each core that it may use.
            spin: those threads stay awake for some 40 ms after each run, instead of from one operator to the next
                only (before onnxruntime 1.26: instead of not at all); slower where others have work, too.
            arena: keep the memory of the largest batch for the next; False gives it back after each.
            batch_size: the most images in one run of the graph; longer lists are split.
            decoders: threads that decode the next batch while the graph runs; None is one for each processor.
            precision: which of the bundle's graphs; another than fp32 is never chosen unasked.
            abstain: give no label below this score, in [0, 1].
            top: how many classes `Prediction.top` lists.
            limits: what one image may cost.
            check: compare the graph's answers with the bundle's golden ones.

        Raises:
            BundleError: the bundle differs from its manifest, or answers otherwise than when it was made.
            InputError: there is no such bundle or precision, or an argument is out of range.
            SetupError: onnxruntime or a provider is missing.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, not {threads}")
        bundle = open_bundle(path, digest, precision)
        variant = bundle.manifest.variants[precision]
        session = Session(
            bundle.contents[variant.file],
            size=bundle.manifest.preprocess.size,
            classes=len(bundle.labels),
            providers=providers,
            threads=threads,
            spin=spin,
            arena=arena,
        )
        guard = cls(
            bundle,
            session,
            batch_size=batch_size,
            decoders=decoders,
            abstain=abstain,
            top=top,
            limits=limits,
            tolerance=bundle.manifest.tolerance(variant),
        )
        if check:
            guard.self_test(load_golden(bundle.contents[variant.golden]))
        return guard

    @overload
    def predict(self, images: list[Source]) -> list[Prediction]: ...
    @overload
    def predict(self, images: ImageSource) -> Prediction: ...
    def predict(self, images: ImageSource | list[Source]) -> Prediction | list[Prediction]:
        """The guarded answer for one image, or a list of answers for a list of images.

        An image is a path, bytes, a Pillow image, or an RGB uint8 array (H, W, 3). In a list, an image that
        fails gives a Prediction with `error` and costs the others nothing.

        Raises:
            ImageError: the single image cannot be used.
            CheckError: the graph's answer to the single image is not finite.
            SetupError: onnxruntime failed.
        """
        if isinstance(images, list):
            return list(self._answers(images))
        if inspect.isgenerator(images):
            raise ImageError("cannot take a generator; pass it to predict_stream")
        (prediction,) = self._predictions(self.run(self._pixels(images)[None]))
        if prediction.error is not None:
            raise CheckError(prediction.error)
        return prediction

    def predict_stream(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """The guarded answers for any iterable of images, in its order, two batches in memory at most.

        A bad image gives a Prediction with `error`. An error of the iterable itself is raised after the answers
        for everything before it. Nothing is read before the first answer is asked for; the first then waits for
        `batch_size` images, so a live source wants a classifier loaded with `batch_size=1`.

        Raises:
            SetupError: onnxruntime failed.
        """
        yield from self._answers(images)

    def predict_proba(self, images: list[Source]) -> npt.NDArray[np.float64]:
        """Softmax of the guarded logits (N, C) in the order of `classes_`.

        Raises:
            ImageError: an image cannot be used; the message starts with its place in the list.
            CheckError: an answer is not finite.
            SetupError: onnxruntime failed.
        """
        if not isinstance(images, list):
            raise ImageError("predict_proba takes a list of images; put a single one into a list")
        scores = np.empty((len(images), len(self._labels)))
        start = 0
        with closing(self._decoded(images)) as batches:
            for decoded in batches:
                for place, item in enumerate(decoded, start):
                    if isinstance(item, ImageError):
                        raise ImageError(f"image {place}: {item}") from item
                logits = self.run(np.stack([item for item in decoded if not isinstance(item, ImageError)])).logits
                if not np.isfinite(logits).all():
                    raise CheckError(_NOT_FINITE)
                scores[start : start + len(logits)] = softmax(logits)
                start += len(logits)
        return scores

    def as_sklearn(self) -> SklearnClassifier:
        """An adapter for scikit-learn's metrics, scorers and cross-validation; see `SklearnClassifier`."""
        return SklearnClassifier(self)

    def run(self, pixels: Pixels) -> Outputs:
        """The graph's raw answers for prepared images, uint8 (N, S, S, 3): both heads, flag and embedding.

        Raises:
            InputError: the array has another type or shape.
            SetupError: onnxruntime failed.
        """
        return self._session.run(pixels, self._batch_size)

    def self_test(self, golden: Golden) -> float:
        """Worst logit difference from the golden answers.

        Raises:
            BundleError: it lies beyond the tolerance that the manifest grants this precision, or a flag differs.
        """
        bound, size = self._tolerance, self.manifest.preprocess.size
        if golden.images.shape[1:] != (size, size, 3) or golden.logits.shape[1] != len(self._labels):
            raise BundleError(f"{GOLDEN} does not fit {size} pixels and {len(self._labels)} classes")
        found = self.run(golden.images)
        pairs = ((found.logits, golden.logits), (found.logits_original, golden.logits_original))
        worst = float(np.max([np.abs(ours - theirs).max() for ours, theirs in pairs]))
        if not worst <= bound:  # also when it is NaN
            raise BundleError(f"the self-test failed: logits differ by {worst:.3g}, allowed are {bound:.3g}")
        if not np.array_equal(found.triggered, golden.triggered):
            raise BundleError("the self-test failed: the rule's flags differ")
        return worst

    def __repr__(self) -> str:
        """Classes, architecture, verdict, rule and digest."""
        m = self.manifest
        return (
            f"GuardedClassifier({len(self._labels)} classes, {m.model.architecture}, {m.verdict}, "
            f"rule={m.rule.name}, {self.digest})"
        )

    def _pixels(self, source: ImageSource) -> Pixels:
        if self._ready(source):
            return np.asarray(source)
        return prepare(load_image(source, self._limits), self.manifest.preprocess, self._limits)

    def _ready(self, source: ImageSource) -> bool:
        """Whether an array has the size already: resize and crop would copy it, and change nothing."""
        size = self.manifest.preprocess.size
        ready = isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == (size, size, 3)
        return ready and size * size <= self._limits.max_pixels

    def _pixels_or_error(self, source: ImageSource) -> Pixels | ImageError:
        try:
            return self._pixels(source)
        except ImageError as error:
            return error

    def _decoded(self, images: Iterable[ImageSource]) -> Generator[list[Pixels | ImageError]]:
        if isinstance(images, list) and len(images) == 1:  # a thread would cost more than it saves
            yield [self._pixels_or_error(images[0])]
            return
        yield from in_batches(images, self._pixels_or_error, batch_size=self._batch_size, workers=self._decoders)

    def _answers(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        with closing(self._decoded(images)) as batches:
            for decoded in batches:
                good = [item for item in decoded if not isinstance(item, ImageError)]
                answered = iter(self._predictions(self.run(np.stack(good))) if good else [])
                for item in decoded:
                    yield Prediction.failed(str(item), self.digest) if isinstance(item, ImageError) else next(answered)

    def _predictions(self, outputs: Outputs) -> list[Prediction]:
        logits, original = outputs.logits, outputs.logits_original
        finite = np.isfinite(logits + original).all(axis=1)
        with np.errstate(invalid="ignore"):  # rows that are not finite are answered by their error
            scores = softmax(logits)
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, : self._top]
        changed = ranked[:, 0] != original.argmax(axis=1)
        return [
            self._prediction(scores[row], ranked[row], bool(changed[row]), bool(outputs.triggered[row]))
            if finite[row]
            else Prediction.failed(_NOT_FINITE, self.digest)
            for row in range(len(logits))
        ]

    def _prediction(
        self, scores: npt.NDArray[np.float64], ranked: npt.NDArray[np.intp], changed: bool, triggered: bool
    ) -> Prediction:
        index, score = int(ranked[0]), float(scores[ranked[0]])
        silent = self._abstain is not None and score < self._abstain
        return Prediction(
            label=None if silent else self._labels[index],
            index=None if silent else index,
            score=score,
            top=tuple((self._labels[i], float(scores[i])) for i in ranked),
            changed=changed,
            triggered=triggered,
            digest=self.digest,
        )
