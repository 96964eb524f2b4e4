"""A device beside the CPU, for machines without one: it computes on the CPU and refuses tensors that are not its own.

What torch's own devices refuse is refused here: an operation on tensors of two devices, but for copies, indices and
numbers. Made with torch's backend in Python (`torch.utils.backend_registration`), which a process keeps once it has it:
`test_device.py` uses it in a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_ATEN = torch.ops.aten
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class Elsewhere(Tensor):
    """A tensor of the device; `counted` are the operations on such tensors so far."""

    counted: ClassVar[int] = 0
    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device="privateuseone:0",
        )
        return made

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        Elsewhere.counted += 1
        kwargs = dict(kwargs or {})
        if func is _ATEN._to_copy.default:
            target = kwargs.pop("device", None)
            copied = func(args[0].raw, **kwargs)
            return copied if target is not None and target.type == "cpu" else Elsewhere(copied)
        if func is _ATEN.copy_.default:
            _raw(args[0]).copy_(_raw(args[1]))
            return args[0]
        if func not in _INDEXING:
            _refuse_others(func, args, kwargs)
        known = {id(x.raw): x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)}
        result = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        return tree_map(lambda x: known.get(id(x), Elsewhere(x)) if isinstance(x, Tensor) else x, result)


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.raw if isinstance(value, Elsewhere) else value


def _refuse_others(func: Any, args: Any, kwargs: Any) -> None:
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.dim():
            refusal = f"expected all tensors to be on one device, but {func} got one on the CPU"
            print(refusal, file=sys.stderr, flush=True)  # raised in a backward pass it would end the process
            raise RuntimeError(refusal)


def register() -> None:
    """Make the device known to torch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    for name, make in {"empty.memory_format": _empty, "empty_strided": _strided, "arange.start_step": _arange}.items():
        _LIBRARY.impl(name, make, "PrivateUse1")
    _LIBRARY.impl("arange.start", _arange, "PrivateUse1")
    _LIBRARY.impl("arange", lambda end, **options: _arange(0, end, **options), "PrivateUse1")


_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **_: Any) -> Elsewhere:
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Elsewhere:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _arange(start: Any, end: Any, step: Any = 1, dtype: Any = None, **_: Any) -> Elsewhere:
    return Elsewhere(torch.arange(start, end, step, dtype=dtype))
