"""The only importer of onnxruntime at serving: one graph, its doors checked, its providers honest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cbpt_guard.bundle import GRAPH_INPUT, GRAPH_OUTPUTS
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
_SILENT = 4  # what fails is raised; a library does not print


class Outputs(NamedTuple):
    """What the graph answers for N images: logits (N, C) twice, flags (N,), unit features (N, E)."""

    logits: npt.NDArray[np.float32]
    triggered: npt.NDArray[np.bool_]
    logits_original: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]


class Session:
    """A loaded graph; thread-safe. Do not fork a process after creating one.

    Args:
        model: the bytes of the ONNX file.
        size: side S of its images, in pixels.
        classes: how many classes C it must answer for.
        providers: where it runs, by name and in order; None is the CPU.
        threads: onnxruntime's threads within one run; None lets it choose.

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
    ) -> None:
        self.size = size
        self.classes = classes
        self._session = _create(model, _names(providers), threads)
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
            SetupError: onnxruntime failed.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (self.size, self.size, 3):
            expected = f"uint8 (N, {self.size}, {self.size}, 3)"
            raise InputError(f"the graph takes {expected}, not {pixels.dtype} {pixels.shape}")
        starts = range(0, max(len(pixels), 1), batch_size)
        try:
            parts = [self._session.run(GRAPH_OUTPUTS, {GRAPH_INPUT: pixels[i : i + batch_size]}) for i in starts]
        except Exception as error:  # onnxruntime's errors share no base class
            raise SetupError(f"onnxruntime failed; a smaller batch needs less memory: {error}") from error
        outputs = Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if not outputs.logits.shape == outputs.logits_original.shape == (len(pixels), self.classes):
            raise BundleError(f"the graph answers {outputs.logits.shape} for {len(pixels)} x {self.classes} classes")
        return outputs

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


def _create(model: bytes, names: list[str], threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise SetupError(
            "onnxruntime is missing: pip install 'cbpt-guard[cpu]' (or 'cbpt-guard[gpu]', never both)"
        ) from error
    wanted = [PROVIDERS[name] for name in names]
    absent = [name for name in names if PROVIDERS[name] not in ort.get_available_providers()]
    if absent:
        raise SetupError(
            f"this onnxruntime lacks {', '.join(absent)}; it has {', '.join(ort.get_available_providers())}. "
            "For cuda: pip uninstall onnxruntime onnxruntime-gpu, then pip install 'cbpt-guard[gpu]'"
        )
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads or 0
    chosen = [(PROVIDERS[name], _OPTIONS.get(name, {})) for name in names]
    try:
        session = ort.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no base class
        raise BundleError(f"onnxruntime cannot load the graph on {', '.join(names)}: {error}") from error
    if session.get_providers()[: len(wanted)] != wanted:
        raise SetupError(
            f"asked for {', '.join(names)}, but onnxruntime chose {', '.join(session.get_providers())}; "
            "the provider's own libraries or its device are missing"
        )
    return session
