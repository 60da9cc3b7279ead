"""Tensors on device "npu" that have values: the wheel's own host code runs, and the emulation fills its results.

Every operator runs twice. First for real through torch_npu: argument checks, output allocation, choice of the aclnn
entry point, all recorded by the stand-in. Then on copies on the processor, whose values are written into the real
results. FRACTAL_NZ tensors keep theirs in a side table, since the stand-in re-lays nothing out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qhal_npu.calls import INTERNAL

_values: dict[int, Tensor] = {}
"""By the address of the storage: values of FRACTAL_NZ tensors in their logical layout."""


class Device(TorchDispatchMode):
    """While this mode is on, tensors on "npu" have values. calls: operators that ran there, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the device, and on the processor for the values."""
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made_here = isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "npu"
        if not made_here and not any(t.device.type == "npu" for t in tensors):
            return func(*args, **kwargs)
        self.calls.append(str(func))
        theirs, more = _map(args, host), {k: _map(v, host) for k, v in kwargs.items()}
        if "device" in more:
            more["device"] = torch.device("cpu")
        more.pop("pin_memory", None)
        schema = func._schema
        if schema.name in ("aten::_local_scalar_dense", "aten::equal"):
            return func(*theirs, **more)  # a number for the host
        masks = schema.name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masks or schema.name == "aten::nonzero":
            made = func(*theirs, **more).to("npu:0")  # as many rows as the values say: the stand-in cannot know
            _values.pop(made.untyped_storage().data_ptr(), None)  # of a tensor that was here before
            return made
        found = func(*args, **kwargs)
        if schema.name == "aten::_to_copy" and not made_here and kwargs.get("device") is not None:
            return func(*theirs, **more)  # to the host
        views = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if torch.Tag.inplace_view in func.tags or views:
            return found  # views share memory with their base
        writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        if not any("Tensor" in str(r.type) for r in schema.returns) and not any(writes):
            return found  # questions: formats, sizes
        values = func(*theirs, **more)
        for mine, value in _pairs(found, values):
            _fill(mine, value)
        for i, argument in enumerate(schema.arguments):
            if writes[i]:
                mine = args[i] if i < len(args) else kwargs.get(argument.name)
                value = theirs[i] if i < len(theirs) else more.get(argument.name)
                for a, b in _pairs(mine, value):
                    _fill(a, b)
        return found


def host(t: Any) -> Any:
    """A tensor's values on the processor; a device of the processor."""
    if isinstance(t, torch.device):
        return torch.device("cpu") if t.type == "npu" else t
    if not isinstance(t, Tensor) or t.device.type != "npu":
        return t
    kept = _values.get(t.untyped_storage().data_ptr())
    if kept is not None:
        same = (kept.shape, kept.stride()) == (t.shape, t.stride())
        return kept if same else kept.reshape(-1).as_strided(t.shape, t.stride(), t.storage_offset())
    flat = torch.empty(t.untyped_storage().nbytes(), dtype=torch.uint8)
    ctypes.memmove(flat.data_ptr(), t.untyped_storage().data_ptr(), flat.numel())  # the device's memory is the host's
    return torch.empty(0, dtype=t.dtype).set_(flat.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _fill(mine: Any, value: Any) -> None:
    if not isinstance(mine, Tensor) or mine is value:
        return
    if mine.device.type != "npu":
        mine.copy_(value)
        return
    address = mine.untyped_storage().data_ptr()
    if int(torch.ops.npu.get_npu_format(mine)) in INTERNAL:
        _values[address] = value.clone()
        return
    _values.pop(address, None)
    buffer = host(mine)
    buffer.copy_(value)
    ctypes.memmove(address, buffer.untyped_storage().data_ptr(), buffer.untyped_storage().nbytes())


def _map(v: Any, f: Callable[[Any], Any]) -> Any:
    return type(v)(_map(e, f) for e in v) if isinstance(v, list | tuple) else f(v)


def _pairs(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=False):
            yield from _pairs(x, y)
    else:
        yield a, b
