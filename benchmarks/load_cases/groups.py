"""AWQ, GPTQ and AutoRound: words along N or K, groups of 128. No peer of theirs runs on a processor here."""

from __future__ import annotations

from functools import partial

import torch

from load_cases import Case, Files, scales, words


def awq(n: int, k: int, g: torch.Generator, auto_round: bool = False) -> Files:
    tensors = {"qweight": words(g, k, n // 8), "qzeros": words(g, k // 128, n // 8)}
    tensors["scales"] = scales(g, k // 128, n, dtype=torch.half)
    section = {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    if auto_round:
        section = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": False}
    return Files(tensors, section | {"bits": 4, "group_size": 128})


def gptq(bits: int, n: int, k: int, g: torch.Generator, order: bool = False, auto_round: bool = False) -> Files:
    groups = torch.arange(k) // 128
    tensors = {"qweight": words(g, k * bits // 32, n), "qzeros": words(g, k // 128, n * bits // 32)}
    tensors["scales"] = scales(g, k // 128, n, dtype=torch.half)
    tensors["g_idx"] = (groups[torch.randperm(k, generator=g)] if order else groups).to(torch.int32)
    section = {"bits": bits, "group_size": 128, "sym": False, "quant_method": "gptq", "desc_act": order}
    if auto_round:
        del tensors["g_idx"], section["desc_act"]
        return Files(tensors, section | {"quant_method": "auto-round", "packing_format": "auto_round"})
    return Files(tensors, section | {"checkpoint_format": "gptq_v2"})


CASES = [
    Case("AWQ", "gemm", awq),
    *(Case("GPTQ", f"{bits} bits", partial(gptq, bits)) for bits in (2, 3, 4, 8)),
    Case("GPTQ", "4 bits desc_act", partial(gptq, 4, order=True)),
    Case("AutoRound", "auto_awq", partial(awq, auto_round=True)),
    *(Case("AutoRound", f"{bits} bits", partial(gptq, bits, auto_round=True)) for bits in (4, 5)),
]
