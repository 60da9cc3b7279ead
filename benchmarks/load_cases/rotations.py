"""QuaRot: int4 pairs of columns and a Hadamard transform that runs online. No decoder of its own runs here."""

from __future__ import annotations

import torch

from load_cases import Case, Files, raw, scales


def quarot(n: int, k: int, g: torch.Generator) -> Files:
    tensors = {"weight": raw(g, n, k // 2), "weight_scales": scales(g, n, 1)}
    said = {"w_bits": 4, "a_bits": 4, "a_sym": True, "a_clip_ratio": 0.9, "online_full_had": True, "had_dim": -1}
    return Files(tensors, others={"quarot.json": {**said, "K": 1, "in_features": k}}, module="down_proj")


CASES = [Case("QuaRot", "w4a4", quarot)]
