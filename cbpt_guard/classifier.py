"""The runtime: a bundle answers for images, with numpy, Pillow and onnxruntime alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from cbpt_guard.bundle import GOLDEN, Golden, OpenedBundle, load_golden, open_bundle
from cbpt_guard.errors import BundleError, CheckError, ImageError, InputError
from cbpt_guard.images import DEFAULT_LIMITS, ImageLimits, ImageSource, Pixels, load_image, prepare
from cbpt_guard.manifest import Manifest
from cbpt_guard.session import Outputs, Session

Source = TypeVar("Source", bound=ImageSource)
_DECODERS = 4
_NOT_FINITE = "the graph answered with numbers that are not finite"


@dataclass(frozen=True)
class Prediction:
    """The guarded answer for one image.

    Attributes:
        label: the class; None when the image failed (`error` says why) or the score lies below `abstain`.
        index: its place in `classes_`, or None likewise.
        score: softmax of the guarded logits at the best class, in [0, 1]; kept when abstaining.
        top: the best (label, score) pairs, best first; kept when abstaining.
        changed: the guarded answer differs from the undefended zero-shot answer.
        triggered: the rule's test fired: a suspected target with a margin above its threshold.
        digest: which bundle answered.
        error: why there is no answer, or None.
    """

    label: str | None
    index: int | None
    score: float | None
    top: tuple[tuple[str, float], ...]
    changed: bool
    triggered: bool
    digest: str
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values; `top` becomes a list of {"label", "score"}."""
        return asdict(self) | {"top": [{"label": label, "score": score} for label, score in self.top]}


class GuardedClassifier:
    """A purified zero-shot classifier; thread-safe. Do not fork a process after loading one."""

    def __init__(
        self,
        bundle: OpenedBundle,
        session: Session,
        *,
        batch_size: int = 32,
        abstain: float | None = None,
        top: int = 5,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if batch_size < 1 or top < 1:
            raise InputError("batch_size and top must be 1 or more")
        if abstain is not None and not 0 <= abstain <= 1:
            raise InputError(f"abstain is a score between 0 and 1, not {abstain}")
        self.digest = bundle.digest
        self.manifest: Manifest = bundle.manifest
        self.classes_: npt.NDArray[np.str_] = np.array(bundle.labels)
        self._labels = bundle.labels
        self._session = session
        self._batch_size = batch_size
        self._abstain = abstain
        self._top = top
        self._limits = limits

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        providers: str | Sequence[str] | None = None,
        digest: str | None = None,
        threads: int | None = None,
        batch_size: int = 32,
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
            threads: onnxruntime's threads within one run; None lets it choose.
            batch_size: images in one run of the graph.
            precision: which of the bundle's graphs.
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
        session = Session(
            bundle.contents[bundle.manifest.variants[precision].file],
            size=bundle.manifest.preprocess.size,
            classes=len(bundle.labels),
            providers=providers,
            threads=threads,
        )
        guard = cls(bundle, session, batch_size=batch_size, abstain=abstain, top=top, limits=limits)
        if check:
            guard.self_test(load_golden(bundle.contents[GOLDEN]))
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
            batches = range(0, len(images), self._batch_size)
            return [p for i in batches for p in self._predict_batch(images[i : i + self._batch_size])]
        outputs = self.run(self._pixels(images)[None])
        prediction = self._prediction(outputs, 0)
        if prediction.error is not None:
            raise CheckError(prediction.error)
        return prediction

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
        for start in range(0, len(images), self._batch_size):
            decoded = self._decode(images[start : start + self._batch_size])
            for place, item in enumerate(decoded, start):
                if isinstance(item, ImageError):
                    raise ImageError(f"image {place}: {item}") from item
            pixels = np.stack([item for item in decoded if not isinstance(item, ImageError)])
            logits = self.run(pixels).logits
            if not np.isfinite(logits).all():
                raise CheckError(_NOT_FINITE)
            scores[start : start + len(pixels)] = _softmax(logits)
        return scores

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
            BundleError: it lies beyond the manifest's tolerance, or a flag differs.
        """
        bound, size = self.manifest.golden_tolerance, self.manifest.preprocess.size
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
        return prepare(load_image(source, self._limits), self.manifest.preprocess, self._limits)

    def _decode(self, images: Sequence[ImageSource]) -> list[Pixels | ImageError]:
        def one(source: ImageSource) -> Pixels | ImageError:
            try:
                return self._pixels(source)
            except ImageError as error:
                return error

        with ThreadPoolExecutor(_DECODERS) as pool:
            return list(pool.map(one, images))

    def _predict_batch(self, images: Sequence[ImageSource]) -> list[Prediction]:
        decoded = self._decode(images)
        good = [item for item in decoded if not isinstance(item, ImageError)]
        outputs = self.run(np.stack(good)) if good else None
        rows = iter(range(len(good)))
        predictions = []
        for item in decoded:
            if isinstance(item, ImageError) or outputs is None:
                predictions.append(self._failed(str(item)))
            else:
                predictions.append(self._prediction(outputs, next(rows)))
        return predictions

    def _failed(self, error: str) -> Prediction:
        return Prediction(None, None, None, (), False, False, self.digest, error)

    def _prediction(self, outputs: Outputs, row: int) -> Prediction:
        logits, original = outputs.logits[row], outputs.logits_original[row]
        if not (np.isfinite(logits).all() and np.isfinite(original).all()):
            return self._failed(_NOT_FINITE)
        scores = _softmax(logits)
        best = np.argsort(-logits, kind="stable")[: self._top]
        index, score = int(best[0]), float(scores[best[0]])
        silent = self._abstain is not None and score < self._abstain
        return Prediction(
            label=None if silent else self._labels[index],
            index=None if silent else index,
            score=score,
            top=tuple((self._labels[i], float(scores[i])) for i in best),
            changed=index != int(original.argmax()),
            triggered=bool(outputs.triggered[row]),
            digest=self.digest,
        )


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares
