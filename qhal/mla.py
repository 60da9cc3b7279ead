"""Absorbed weights of multi-head latent attention: kv_b_proj as two stacks of per-head weights, exactly.

The latent row c [R] of a token stands for its keys and values: k_nope[h] = c @ W_UK[h].T and v[h] = c @ W_UV[h].T, the
rows of kv_b_proj head by head. Attention over the latent cache needs neither:

    q_nope[h] . k_nope[h]   = (q_nope[h] @ W_UK[h]) . c        so W_UK goes into the query
    sum of p * v[h]         = (sum of p * c) @ W_UV[h].T       and W_UV behind the result

Both are `grouped_gemm` with heads as experts, before and after `QuantOps.attention` on an mla cache. Source: the
DeepSeek-V2 report (2024), section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.errors import ShardError
from qhal.specs import LinearSpec, Weight
from qhal.tensors import QTensor


@dataclass(frozen=True, eq=False)
class AbsorbedWeights:
    """kv_b_proj by heads; each is a weight of `grouped_gemm`, H experts.

    w_uk  [H, R, nope]: q_nope [H, T, nope] -> q_latent [H, T, R]
    w_uv  [H, v, R]: the result of attention [H, T, R] -> [H, T, v]
    """

    w_uk: QTensor | Tensor
    w_uv: QTensor | Tensor


def absorb(kv_b: LinearSpec | Weight, *, heads: int, nope: int, v: int, drop_input: bool = False) -> AbsorbedWeights:
    """Cut kv_b_proj [heads * (nope + v), R] by heads and transpose its key half; values and scales are those stored.

    heads       of this weight: of a shard, if it is one (`LinearSpec.shard(0, ...)` cuts between heads)
    drop_input  accept that a quantization of the latent row before kv_b_proj is left out: absorbed, that product has
                other inputs

    ShardError where a block straddles two heads or has no transpose, and for a layer that is more than its weight:
    dequantize it then, `LinearSpec.effective()`.
    """
    name = kv_b.name or "kv_b_proj" if isinstance(kv_b, LinearSpec) else "kv_b_proj"
    w = _weight(kv_b, name, drop_input) if isinstance(kv_b, LinearSpec) else kv_b
    if isinstance(w, CodebookTensor):
        raise ShardError(f"{name}: codebook weights cannot be absorbed; dequantize them first")
    step = nope + v
    if min(heads, nope, v) < 1 or len(w.shape) != 2 or w.shape[0] != heads * step:
        raise ShardError(f"{name}: {tuple(w.shape)} is not [{heads} heads * ({nope} + {v}), R]")
    if isinstance(w, Tensor):
        by_head = w.reshape(heads, step, w.shape[1])
        return AbsorbedWeights(by_head[:, :nope].transpose(1, 2).contiguous(), by_head[:, nope:].contiguous())
    starts = range(0, heads * step, step)
    try:
        keys = [w.narrow(0, start, start + nope).transposed() for start in starts]
        values = [w.narrow(0, start + nope, start + step) for start in starts]
        return AbsorbedWeights(QTensor.stack(keys), QTensor.stack(values))
    except ShardError as why:
        raise ShardError(f"{name} cannot be absorbed as it is stored ({why}); dequantize it first") from None


def _weight(spec: LinearSpec, name: str, drop_input: bool) -> Weight:
    """The weight of a layer that is nothing but its weight."""
    more = ("rotate_in", "rotate_out", "low_rank", "bias", "operand")
    found = [field for field in more if getattr(spec, field) is not None and getattr(spec, field) != ()]
    if found:
        raise ShardError(f"{name} has {', '.join(found)} and cannot be absorbed; dequantize it first")
    if spec.input is not None and not drop_input:
        raise ShardError(
            f"{name} quantizes its input to {spec.input.format}; absorbed, that product has other inputs: "
            "pass drop_input=True to leave the quantization out"
        )
    return spec.weight
