"""The only importer of onnxruntime at serving: one graph, its doors checked, its providers honest."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from cbpt_guard.bundle import GRAPH_INPUT, GRAPH_OUTPUTS
from cbpt_guard.decoding import processors_here
from cbpt_guard.errors import BundleError, InputError, SetupError
from cbpt_guard.images import Pixels

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
# TF32 rounds inputs to 10 bits: logits at CLIP's scale of 100 then move further than a self-test allows
_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}
_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_SPIN_MICROSECONDS = 50  # from one operator to the next; onnxruntime's own 40 ms take a core from whoever comes after
_BOUNDED_SPIN = (1, 26)  # the first version that lets it be bounded
_SILENT = 4  # what fails is raised; a library does not print


class Outputs(NamedTuple):
    """What the graph answers for N images: logits (N, C) twice, flags (N,), unit features (N, E)."""

    logits: npt.NDArray[np.float32]
    triggered: npt.NDArray[np.bool_]
    logits_original: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]


class Session:
    """A loaded graph; thread-safe. Load it after forking, in each process.

    Args:
        model: the bytes of the ONNX file.
        size: side S of its images, in pixels.
        classes: how many classes C it must answer for.
        providers: where it runs, by name and in order; None is the CPU.
        threads: onnxruntime's threads within one run; None is one for each core that this process may use.
        spin: its threads stay awake for some 40 ms after each run, instead of from one operator to the next only.
        arena: it keeps the memory of past runs for the next.

    Raises:
        BundleError: the bytes are no such graph.
        InputError: an unknown provider name.
        SetupError: onnxruntime or a provider is missing.
    """

    def __init__(
        self,
        model: bytes,
        *,
        size: int,
        classes: int,
        providers: str | Sequence[str] | None = None,
        threads: int | None = None,
        spin: bool = False,
        arena: bool = True,
    ) -> None:
        self.size = size
        self.classes = classes
        self._process = os.getpid()
        self._session = _create(model, _names(providers), threads, spin=spin, arena=arena)
        self._check_doors()

    @property
    def providers(self) -> list[str]:
        """onnxruntime's names of the providers in use."""
        return list(self._session.get_providers())

    def run(self, pixels: Pixels, batch_size: int = 32) -> Outputs:
        """The graph's answers for prepared images, uint8 (N, S, S, 3); N may be 0.

        Raises:
            BundleError: the graph answers for another number of classes.
            InputError: the array has another type or shape.
            SetupError: onnxruntime failed, or this process was forked from the one that loaded the graph.
        """
        if self._process != os.getpid():
            raise SetupError(
                f"the graph was loaded in process {self._process} and its threads do not exist in this fork of it, "
                f"{os.getpid()}; load the bundle after forking, in each worker"
            )
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (self.size, self.size, 3):
            expected = f"uint8 (N, {self.size}, {self.size}, 3)"
            raise InputError(f"the graph takes {expected}, not {pixels.dtype} {pixels.shape}")
        if len(pixels) == 0:  # onnxruntime before 1.31 divides by it, which ends the process
            blank = np.zeros((1, self.size, self.size, 3), np.uint8)
            logits, triggered, original, embedding = self.run(blank)
            return Outputs(logits[:0], triggered[:0], original[:0], embedding[:0])
        starts = range(0, len(pixels), batch_size)
        try:
            parts = [self._session.run(GRAPH_OUTPUTS, {GRAPH_INPUT: pixels[i : i + batch_size]}) for i in starts]
        except Exception as error:  # onnxruntime's errors share no base class
            raise SetupError(f"onnxruntime failed; a smaller batch needs less memory: {error}") from error
        for start, part in zip(starts, parts, strict=True):
            self._check_answer([np.shape(output) for output in part], min(batch_size, len(pixels) - start))
        return Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def __reduce__(self) -> NoReturn:
        """A loaded graph lives in its own process."""
        raise SetupError("a loaded classifier cannot be pickled or copied; load the bundle in each process")

    def _check_answer(self, shapes: list[tuple[int, ...]], count: int) -> None:
        scores, embedding = (count, self.classes), shapes[-1]
        if shapes[:-1] != [scores, (count,), scores] or len(embedding) != 2 or embedding[0] != count:
            raise BundleError(f"the graph answers {shapes} for {count} images of {self.classes} classes")

    def _check_doors(self) -> None:
        expected = ([GRAPH_INPUT], "tensor(uint8)", [self.size, self.size, 3])
        inputs = self._session.get_inputs()
        found = ([i.name for i in inputs], inputs[0].type, inputs[0].shape[1:]) if inputs else ([], "", [])
        if found != expected:
            raise BundleError(f"the graph's input is {found}, expected {expected}")
        missing = set(GRAPH_OUTPUTS) - {output.name for output in self._session.get_outputs()}
        if missing:
            raise BundleError(f"the graph has no output named {', '.join(sorted(missing))}")


def _names(providers: str | Sequence[str] | None) -> list[str]:
    names = ["cpu"] if providers is None else [providers] if isinstance(providers, str) else list(providers)
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown or not names:
        raise InputError(f"unknown provider {unknown}; the names are {', '.join(PROVIDERS)}")
    return names


def _create(model: bytes, names: list[str], threads: int | None, *, spin: bool, arena: bool) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise SetupError(
            f"onnxruntime is missing: pip install 'cbpt-guard[cpu]' (or 'cbpt-guard[gpu]', never both){_two_builds()}"
        ) from error
    wanted = [PROVIDERS[name] for name in names]
    _check_available(names, ort.get_available_providers())
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = _threads_here() if threads is None else threads
    options.enable_cpu_mem_arena = arena
    bounded = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= _BOUNDED_SPIN
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin or bounded)))
    if bounded and not spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    chosen = [(PROVIDERS[name], _OPTIONS.get(name, {})) for name in names]
    try:
        session = ort.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no base class
        raise BundleError(f"onnxruntime cannot load the graph on {', '.join(names)}: {error}") from error
    if session.get_providers()[: len(wanted)] != wanted:
        raise SetupError(
            f"asked for {', '.join(names)}, but onnxruntime chose {', '.join(session.get_providers())}; "
            f"the provider's own libraries or its device are missing{_two_builds()}"
        )
    if both := _two_builds(before=""):
        warnings.warn(both, RuntimeWarning, stacklevel=2)
    session._model_bytes = None  # kept for a fallback that is switched off: as much memory as the weights
    _trim()
    return session


def _trim() -> None:
    """Hand back what onnxruntime freed while it loaded: glibc kept 200 MB of it after a ViT-B-32."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library; it keeps its own counsel


def _threads_here() -> int:
    """0 leaves it to onnxruntime: one for each core, which is too many where this process may use fewer."""
    allowed = processors_here()
    return 0 if allowed == os.cpu_count() else allowed


def _check_available(names: list[str], available: list[str]) -> None:
    absent = [name for name in names if PROVIDERS[name] not in available]
    if absent:
        raise SetupError(
            f"this onnxruntime lacks {', '.join(absent)}; it has {', '.join(available)}{_two_builds()}. "
            "For cuda: pip uninstall onnxruntime onnxruntime-gpu, then pip install 'cbpt-guard[gpu]'"
        )


def _two_builds(before: str = "; ") -> str:
    """What to say when several builds of onnxruntime are installed: all own one folder, and the last one won."""
    found = builds_here()
    if len(found) < 2:
        return ""
    return (
        f"{before}{' and '.join(found)} are both installed and overwrite each other's files: uninstall all, install one"
    )


def builds_here() -> dict[str, str]:
    """onnxruntime's builds that are installed, by the names they are published under, with their versions."""
    found = {}
    for name in _BUILDS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
