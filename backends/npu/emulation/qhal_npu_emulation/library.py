"""The emulated operators under the dispatcher's CPU key.

Without torch_npu the schemas of `schemas.txt` (dumped from the wheel) are defined first, so that the dispatcher checks
every keyword as the wheel would. With it the wheel's own are there, and every call also goes to its Meta kernel, whose
shapes and types must be those of the emulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal_npu_emulation import attention, matmuls, quantizers

SCHEMAS = Path(__file__).with_name("schemas.txt")
KERNELS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        quantizers.npu_quantize,
        quantizers.npu_dynamic_quant,
        quantizers.npu_dynamic_mx_quant,
        matmuls.npu_quant_matmul,
        matmuls.npu_weight_quant_batchmatmul,
        matmuls.npu_grouped_matmul,
        matmuls.npu_convert_weight_to_int4pack,
        matmuls.npu_format_cast,
        attention.npu_fused_infer_attention_score,
        attention.npu_fused_infer_attention_score_v2,
        attention.npu_scatter_nd_update_,
    )
}
NO_META: dict[str, Callable[..., Tensor]] = {
    "npu_convert_weight_to_int4pack": lambda w, inner_k_tiles=0: w.new_empty(
        *w.shape[:-1], w.shape[-1] // 8, dtype=torch.int32
    ),
    "npu_format_cast": lambda x, acl_format, **more: x.new_empty(x.shape),
}
"""What the wheel has no Meta kernel for."""
CALLS: Counter[str] = Counter()
"""Emulated calls, by operator."""
KEYWORDS: Counter[str] = Counter()
"""Calls whose every keyword is in the schema of `schemas.txt`."""
META: Counter[str] = Counter()
"""Calls that the wheel's own Meta kernel accepted."""
_kept: list[torch.library.Library] = []


def install() -> None:
    """Register everything, once per process."""
    if _kept:
        return
    wheel = find_spec("torch_npu") is not None
    if wheel:
        from qhal_npu_emulation import standins

        standins.load()
    library = torch.library.Library("npu", "FRAGMENT")
    _kept.append(library)
    if not wheel:
        for line in SCHEMAS.read_text().splitlines():
            if line.startswith("npu::"):
                library.define(line.removeprefix("npu::"))
    for name, meta in NO_META.items():
        library.impl(name, meta, "Meta")
    for name, kernel in KERNELS.items():
        library.impl(name, _checked(name, kernel, wheel), "CPU")
    aten = torch.library.Library("aten", "FRAGMENT")
    _kept.append(aten)
    aten.impl("mm.dtype", matmuls.mm_dtype, "CPU")


def _checked(name: str, kernel: Callable[..., Any], wheel: bool) -> Callable[..., Any]:
    op = getattr(torch.ops.npu, name)
    line = next(s for s in SCHEMAS.read_text().splitlines() if s.startswith(f"npu::{name}("))
    known = {a.name for a in torch._C.parse_schema(line).arguments}

    def run(*args: Any, **kwargs: Any) -> Any:
        want = op(*_meta(args), **{key: _meta(value) for key, value in kwargs.items()}) if wheel else None
        found = kernel(*args, **kwargs)
        CALLS[name] += 1
        KEYWORDS[name] += set(kwargs) <= known
        if wheel:
            got, asked = ([(tuple(t.shape), t.dtype) for t in _flat(v)] for v in (found, want))
            if got != asked:
                raise AssertionError(f"{name}: the emulation gives {got}, the wheel's Meta kernel {asked}")
            META[name] += 1
        return found

    return run


def _meta(v: Any) -> Any:
    if isinstance(v, Tensor):
        return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
    return [_meta(e) for e in v] if isinstance(v, list | tuple) else v


def _flat(v: Any) -> list[Tensor]:
    return [t for e in v for t in _flat(e)] if isinstance(v, list | tuple) else [v]
