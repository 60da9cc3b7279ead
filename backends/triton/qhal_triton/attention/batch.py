"""TritonBatch: lengths, pages and workspace of one step in device buffers that keep their addresses."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from qhal.caches import AttentionBatch, Limits
from qhal.errors import BatchError
from qhal.requests import AttentionRequest
from qhal_portable.attention import check_plan, check_roots, check_tree
from qhal_triton.attention.config import Config, blocks, merged_columns, power, words
from qhal_triton.attention.kernels.attend import attend
from qhal_triton.attention.kernels.merge import merge
from qhal_triton.attention.paths import Arithmetic
from qhal_triton.bits import INTERPRETED
from qhal_triton.launching import Launcher
from qhal_triton.target import Target

_TENSORS = (
    "q", "q_scale", "q_zero", "q_outer", "p", "p_scale_of_q",
    "k", "k_scale", "k_zero", "k_outer", "v", "v_scale", "v_zero", "v_outer", "sinks", "weight_scale", "out", "lse",
)  # fmt: skip
_NUMBERS = (
    "q_token", "q_head", "q_groups", "p_token", "p_head", "p_groups",
    *(f"{plane}_{axis}" for plane in ("k", "ks", "kz", "v", "vs", "vz") for axis in ("page", "slot", "head")),
    "pages", "o_token", "o_head", "l_token", "l_head", "has_sinks", "has_lse",
)  # fmt: skip
"""Of a call: the kernel's names."""
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


class TritonBatch(AttentionBatch):
    """What kernels read of one step.

    steps     int32 [4 B + 2 n] of n blocks of query rows: for every sequence its first query row, query length, key
              length and first entry of the tree; for every block its sequence, -1 for none, and its first token there
    table     int32 [B, pages]
    tree      uint8, where the request has trees
    partial, tops, sums  fp32, unless the keys stay in one part: values, maximum and sum of every part
    """

    def __init__(
        self,
        request: AttentionRequest,
        limits: Limits,
        device: torch.device,
        target: Target,
        arithmetic: Arithmetic,
        c: Config,
    ) -> None:
        self.request, self.limits, self.device, self.target = request, limits, device, target
        self.arithmetic, self.config = arithmetic, c
        self.constants = constants(request, arithmetic, c, target)
        self.words = words(request, arithmetic, c.m, target)
        self.reader = (request, self.words)  # what a cache remembers for it
        self.blocks, self.tokens = blocks(limits, c), 0
        self.steps = torch.zeros(4 * limits.batch + 2 * self.blocks, dtype=torch.int32, device=device)
        self.steps[4 * limits.batch :] = -1
        self.table = torch.zeros(limits.batch, max(limits.pages, 1), dtype=torch.int32, device=device)
        self.tree = torch.ones(limits.tokens**2 if request.tree else 1, dtype=torch.uint8, device=device)
        parts = limits.tokens * request.heads * c.splits if c.splits > 1 else 0
        wide = request.kv.k_dim if request.kv.kind == "mla" else request.kv.v_dim
        self.partial = torch.empty(parts * wide, dtype=torch.float32, device=device)
        self.tops, self.sums = torch.empty(2, max(parts, 1), dtype=torch.float32, device=device)
        share = request.heads // request.kv.heads
        self.grid = (self.blocks, request.kv.heads * -(-share // c.together), c.splits)
        self.attend, self.merge = self._launchers(share)

    def _launchers(self, share: int) -> tuple[Launcher, Launcher]:
        """The kernels with what this batch fixes."""
        request, c = self.request, self.config
        none = self.tops
        partial = (self.partial, self.tops, self.sums) if c.splits > 1 else (none, none, none)
        parts = dict(zip(("partial", "partial_max", "partial_sum"), partial, strict=True))
        sizes = {
            "table_row": self.table.stride(0), "batch": self.limits.batch, "blocks": self.blocks, "splits": c.splits,
            "shift": request.kv.page.bit_length() - 1, "heads": request.heads, "share": share, "together": c.together,
            "causal": int(request.causal and not request.tree), "window": request.window or 0, "scale": request.scale,
            "softcap": request.softcap or 1.0,
        }  # fmt: skip
        held = {"plan": self.steps, "table": self.table, "tree": self.tree, **parts}
        options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}
        one = Launcher(attend, _TENSORS, _NUMBERS, {**held, **sizes, **self.constants}, **options)
        wide = request.kv.k_dim if request.kv.kind == "mla" else request.kv.v_dim
        fixed = {**parts, "splits": c.splits, "heads": request.heads, "dim": wide}
        fixed["COLS"] = self.columns = merged_columns(c.splits, wide)
        numbers = ("o_token", "o_head", "l_token", "l_head", "has_sinks", "has_lse")
        two = Launcher(
            merge, ("sinks", "out", "lse"), numbers, {**fixed, "ALL": power(c.splits)}, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        return one, two

    def plan(
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        """Checks what the host knows against the limits, then copies; nothing waits for the device.

        A length on the device above its bound counts as the bound, and a sequence with a page outside of the cache
        gets NaN: both are errors where the values are on the host.
        """
        need = check_plan(self.request, self.limits, query_lens, kv_lens, page_table, kv_lens_device)
        queries, bounds = query_lens.tolist(), kv_lens.tolist()
        check_tree(self.request, queries, tree)
        if tree is not None and tree.is_cpu:
            check_roots(queries, tree)
        if kv_lens_device is not None and kv_lens_device.is_cpu:
            for b, (length, bound) in enumerate(zip(kv_lens_device.tolist(), bounds, strict=True)):
                if not 0 <= length <= bound:
                    raise BatchError(f"sequence {b}: kv_lens_device says {length}, the bound on the host was {bound}")
        count, size = len(queries), self.limits.batch
        steps = self._steps(queries, bounds)
        self.steps.copy_(steps.pin_memory() if self.device.type != "cpu" else steps, non_blocking=True)
        if kv_lens_device is not None:
            keys = self.steps[2 * size : 2 * size + count]
            given = kv_lens_device.to(self.device, torch.int32, non_blocking=True)
            torch.minimum(keys, given.clamp_min(0), out=keys)
        self.table[:count, :need].copy_(page_table[:count, :need], non_blocking=True)
        if tree is not None:
            self.tree[: tree.numel()].copy_(tree, non_blocking=True)
        self.tokens = sum(queries)

    def _steps(self, queries: list[int], bounds: list[int]) -> Tensor:
        """The buffer of that name on the host."""
        size, tokens = self.limits.batch, self.config.m // self.config.together
        idle = [0] * (size - len(queries))
        firsts: list[int] = []
        trees: list[int] = []
        sequences: list[int] = []
        starts: list[int] = []
        row = square = 0
        for b, n in enumerate(queries):
            firsts.append(row)
            trees.append(square)
            row, square = row + n, square + n * n
            starts += range(0, n, tokens)
            sequences += [b] * -(-n // tokens)
        unused = [-1] * (self.blocks - len(starts))
        parts = (firsts, idle, queries, idle, bounds, idle, trees, idle, sequences, unused, starts, unused)
        return torch.tensor([value for part in parts for value in part], dtype=torch.int32)


def constants(request: AttentionRequest, a: Arithmetic, c: Config, target: Target) -> dict[str, Any]:
    """The constexpr arguments of `attend`."""
    kv = request.kv
    columns = (max(power(-(-dim // (1 + row.packed))), 16) for dim, row in ((kv.k_dim, a.k), (kv.v_dim, a.v)))
    return dict(
        Q=a.q, QR=a.rope, K=a.k, V=a.v,
        Q_PARTS=a.q_parts, QR_PARTS=a.rope_parts, K_PARTS=a.k_parts, V_PARTS=a.v_parts,
        TYPE=_TYPES[a.type], QK_ROPE=_TYPES[a.rope_type],
        P=a.p, P_STATIC=a.p_static, P_DIVIDES=a.p_divides, P_PARTS=a.p_parts, PV=_TYPES[a.pv],
        MLA=kv.kind == "mla", DK=kv.k_dim, DV=kv.v_dim, **dict(zip(("BK", "BV"), columns, strict=True)),
        ONE=kv.page % c.n == 0, M=c.m, N=c.n, TREE=request.tree, EDGES=c.edges, SOFTCAP=request.softcap is not None,
        NATIVE=target.kind == "cuda" and "e4m3fn" in target.fp8 and not INTERPRETED,
    )  # fmt: skip
