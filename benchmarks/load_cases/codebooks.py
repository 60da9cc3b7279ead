"""AQLM, VPTQ and QuIP#: indices into codebooks. Their own decoders need a device or packages that are not here."""

from __future__ import annotations

from functools import partial

import torch

from load_cases import MODULE, Case, Files, Tensors, scales, words


def aqlm(books: int, bits: int, n: int, k: int, g: torch.Generator) -> Files:
    dtype = torch.int8 if bits == 8 else torch.int16
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (n, k // 8, books), generator=g).to(dtype)
    tensors: Tensors = {"codes": codes, "codebooks": torch.randn(books, 1 << bits, 1, 8, generator=g).half()}
    tensors["scales"] = scales(g, n, 1, 1, 1, dtype=torch.half)
    section = {"quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits, "in_group_size": 8}
    return Files(tensors, section | {"out_group_size": 1, "linear_weights_not_to_quantize": []})


def vptq(bits: int, residual: int, n: int, k: int, g: torch.Generator) -> Files:
    main, rest = 1 << bits, (1 << residual) if residual else -1
    said = {"bias": False, "enable_norm": True, "enable_perm": True, "group_num": 1, "group_size": k, "in_features": k}
    said |= {"indices_as_float": False, "is_indice_packed": True, "out_features": n, "outlier_size": 0}
    said |= {"num_centroids": [-1, main], "num_res_centroids": [-1, rest], "vector_lens": [-1, 8]}  # type: ignore[dict-item]
    said["vector_quant_dim"] = "out"  # type: ignore[assignment]
    tensors: Tensors = {"centroids.weight": torch.randn(1, main * 8, generator=g).half()}
    if residual:
        tensors["res_centroids.weight"] = torch.randn(1, rest * 8, generator=g).half()
    tensors["indices"] = words(g, 1, n // 8, k * (bits + residual) // 32)
    tensors["perm"] = torch.randperm(k, generator=g).to(torch.int16)
    tensors |= {"weight_scale": scales(g, k, dtype=torch.half), "weight_bias": scales(g, k, dtype=torch.half)}
    return Files(tensors, {"quant_method": "vptq", "config_for_layers": {MODULE: said}})


def quip(name: str, n: int, k: int, g: torch.Generator) -> Files:
    number, columns = {"E8P12": (7, 2), "E8P12RVQ4B": (17, 4), "E8P12RVQ3B": (18, 3)}[name]
    codes = torch.randint(-(2**62), 2**62, (n, k // 64 * columns), generator=g)
    tensors: Tensors = {"Qidxs": codes, "SU": scales(g, k, dtype=torch.half), "SV": scales(g, n, dtype=torch.half)}
    tensors |= {"Wscale": torch.tensor(1.0), "codebook_id": torch.tensor(number)}
    params = {"codebook": name, "codebook_version": 1, "codesz": 8, "idx_dtype": "torch.int64", "lora_rank": 0}
    params |= {"outlier_channel_split": False, "packsz": 8 / columns, "rescale_WH": False, "model_version": 1}
    return Files(
        tensors, config={"quip_params": params | {"resid_scale_override": -1, "pack_out": False, "fused": False}}
    )


CASES = [
    Case("AQLM", "2x8 g8", partial(aqlm, 2, 8)),
    Case("AQLM", "1x16 g8", partial(aqlm, 1, 16)),
    Case("VPTQ", "12 bits", partial(vptq, 12, 0)),
    Case("VPTQ", "16 + 8 bits", partial(vptq, 16, 8)),
    *(Case("QuIP#", name, partial(quip, name)) for name in ("E8P12", "E8P12RVQ4B")),
]
