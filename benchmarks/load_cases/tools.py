"""Quark, ModelSlim, ModelOpt, FP8, gpt-oss, bitsandbytes and torchao: the forms that their tools write most.

Peers: transformers decodes FP8 with tiles and gpt-oss' blocks. The others' own decoders need a device, or packages that
are not installed for development.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from load_cases import MODULE, Case, Files, Tensors, raw, scales, words
from qhal.elements import values

FP8 = torch.float8_e4m3fn


def quark(
    dtype: str, qscheme: str, n: int, k: int, g: torch.Generator, size: int = 0, method: str = "reorder"
) -> Files:
    mx = dtype.startswith("fp") and dtype != "fp8_e4m3"
    record = {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, "symmetric": dtype != "uint4"}
    record |= {"ch_axis": -1 if size else 0, "group_size": size or None, "scale_type": "float"}
    record |= {"scale_format": "e8m0", "symmetric": None} if mx else {}
    tensors: Tensors = {}
    if dtype.endswith("int4"):
        tensors["weight"] = words(g, k, n // 8) if size else words(g, n, k // 8)
        tensors["weight_scale"] = scales(g, *((k // size, n) if size else (n,)), dtype=torch.bfloat16)
        tensors["weight_zero_point"] = words(g, *((k // size, n // 8) if size else (n // 8,)))
        if dtype == "int4":
            tensors["weight_zero_point"].zero_()
    elif mx:
        width = k // 2 if dtype == "fp4" else k // 4 * 3
        tensors |= {"weight": raw(g, n, width), "weight_scale": raw(g, n, k // size)}
    else:
        code = FP8 if dtype == "fp8_e4m3" else torch.int8
        shape = (k, n) if size else (n, k)
        tensors["weight"] = raw(g, *shape, dtype=code)
        tensors["weight_scale"] = scales(g, *((k // size, n) if size else (n,)))
    weight = {"weight": record, "bias": None, "input_tensors": None, "output_tensors": None}
    section: dict[str, Any] = {"quant_method": "quark", "global_quant_config": weight, "exclude": [], "version": "0.13"}
    section["export"] = {"pack_method": method, "weight_format": "real_quantized", "kv_cache_group": []}
    section |= {"layer_quant_config": {}, "layer_type_quant_config": {}, "quant_mode": "eager_mode"}
    return Files(tensors, section)


def modelslim(kind: str, n: int, k: int, g: torch.Generator, size: int = 0) -> Files:
    groups = k // size if size else 1
    zeros = torch.zeros(n, groups)
    tensors: Tensors = {"weight": raw(g, n, k, dtype=torch.int8), "weight_scale": scales(g, n, groups)}
    tensors["weight_offset"] = zeros
    if kind == "W8A8":
        tensors = {"weight": tensors["weight"], "deq_scale": scales(g, n), "input_scale": scales(g, 1)}
        tensors |= {"input_offset": torch.zeros(1), "quant_bias": torch.zeros(n, dtype=torch.int32)}
    elif kind in ("W4A8_DYNAMIC", "W4A16"):
        tensors["weight"] = raw(g, n // 2, k, dtype=torch.int8)
    if kind == "W4A8_DYNAMIC":
        low, high = (tensors["weight"] << 4) >> 4, tensors["weight"] >> 4
        rows = torch.stack([low, high], 1).flatten(0, 1).double().sum(-1, keepdim=True)
        tensors["scale_bias"] = (8 * rows * tensors["weight_scale"].double()).float()
    elif kind == "WFP8AFP8_DYNAMIC":
        tensors["weight"] = raw(g, n, k, dtype=FP8)
    elif kind == "W4A4_MXFP4":
        tensors = {"weight": raw(g, n, k // 2), "weight_scale": raw(g, n, k // 32)}
    said = {f"{MODULE}.{leaf}": kind for leaf in tensors}
    said |= {"version": "1.0.0", "model_quant_type": kind, "group_size": size}  # type: ignore[dict-item]
    return Files(tensors, others={"quant_model_description.json": said})


def modelopt(algorithm: str, n: int, k: int, g: torch.Generator) -> Files:
    one = torch.tensor(0.01)
    tensors: Tensors = {"weight": raw(g, n, k, dtype=FP8), "weight_scale": one, "input_scale": one.clone()}
    if algorithm == "NVFP4":
        tensors |= {"weight": raw(g, n, k // 2), "weight_scale": raw(g, n, k // 16, dtype=FP8)}
        tensors["weight_scale_2"] = one.clone()
    elif algorithm == "W4A16_AWQ":
        tensors = {"weight": raw(g, n // 2, k), "weight_scale": scales(g, n, k // 128)}
        tensors["pre_quant_scale"] = scales(g, k, dtype=torch.bfloat16)
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": []}
    said |= {"NVFP4": {"group_size": 16}, "W4A16_AWQ": {"group_size": 128, "has_zero_point": False}}.get(algorithm, {})
    if algorithm == "W4A16_AWQ":
        said["pre_quant_scale"] = True
    producer = {"name": "modelopt", "version": "0.47.0"}
    return Files(tensors, others={"hf_quant_config.json": {"producer": producer, "quantization": said}})


def fp8_block(n: int, k: int, g: torch.Generator) -> Files:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = {"weight": raw(g, n, k, dtype=FP8), "weight_scale_inv": scales(g, -(-n // 128), -(-k // 128))}
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    decoder = Fp8Dequantize(None)

    def peer(t: Tensors) -> object:
        return decoder._dequantize_one(t["weight"], t["weight_scale_inv"], torch.bfloat16)

    return Files(tensors, section, peer=peer)


def gpt_oss(n: int, k: int, g: torch.Generator) -> Files:
    """Four experts, together as large as the other weights; gate_up_proj is the module."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, rows, inner = 4, n // 4, n // 8
    shapes = {"gate_up_proj": (experts, rows, k), "down_proj": (experts, k, inner)}
    tensors: Tensors = {}
    for name, (e, a, b) in shapes.items():
        tensors[f"{name}_blocks"] = raw(g, e, a, b // 32, 16)
        tensors[f"{name}_scales"] = raw(g, e, a, b // 32)
        tensors[f"{name}_bias"] = torch.zeros(e, a, dtype=torch.bfloat16)
    config = {"model_type": "gpt_oss", "num_local_experts": experts, "hidden_size": k, "intermediate_size": inner}

    def peer(t: Tensors) -> object:
        return convert_moe_packed_tensors(t["gate_up_proj_blocks"], t["gate_up_proj_scales"])

    leaves, module = tuple(leaf for leaf in tensors if leaf.startswith("gate_up_proj")), "model.layers.0.mlp.experts"
    files = Files(tensors, {"quant_method": "mxfp4"}, module, config, peer=peer)
    files.target, files.leaves = f"{module}.gate_up_proj", leaves
    return files


def bitsandbytes(kind: str, n: int, k: int, g: torch.Generator) -> Files:
    four = kind != "int8"
    section = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    if not four:
        tensors = {"weight": raw(g, n, k, dtype=torch.int8), "SCB": scales(g, n)}
        return Files(tensors, section | {"llm_int8_threshold": 6.0})
    double, blocks = kind == "nf4 double", n * k // 64
    section |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": "uint8"}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    table = values("nf4")
    assert table is not None
    tensors = {"weight": raw(g, n * k // 2, 1), "weight.absmax": scales(g, blocks), "weight.quant_map": table.clone()}
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors |= {"weight.absmax": raw(g, blocks), "weight.nested_absmax": scales(g, -(-blocks // 256))}
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return Files(tensors, section)


def torchao(kind: str, n: int, k: int, g: torch.Generator) -> Files:
    config = {"Int8Tensor": "Int8WeightOnlyConfig", "Int4Tensor": "Int4WeightOnlyConfig"}[kind]
    if kind == "Int8Tensor":
        tensors, block = {"qdata": raw(g, n, k, dtype=torch.int8), "scale": scales(g, n, 1)}, [1, k]
    else:
        tensors, block = {"qdata": raw(g, n, k // 2), "scale": scales(g, k // 128, n, dtype=torch.bfloat16)}, [1, 128]
        tensors["zero_point"] = scales(g, k // 128, n, dtype=torch.bfloat16)
    said = {"_type": kind, "_data": {"block_size": block}, "_tensor_data_names": list(tensors)}
    section = {"quant_method": "torchao", "quant_type": {"default": {"_type": config, "_data": {}}}}
    return Files(tensors, section, metadata={f"{MODULE}.weight": json.dumps(said)}, join="._weight_")


CASES = [
    Case("Quark", "int4 g128", partial(quark, "int4", "per_group", size=128)),
    Case("Quark", "int4 g128, order", partial(quark, "int4", "per_group", size=128, method="order")),
    Case("Quark", "uint4 g128", partial(quark, "uint4", "per_group", size=128)),
    Case("Quark", "int4 channel", partial(quark, "int4", "per_channel")),
    Case("Quark", "int8 g128", partial(quark, "int8", "per_group", size=128)),
    Case("Quark", "fp8 channel", partial(quark, "fp8_e4m3", "per_channel")),
    Case("Quark", "mxfp4", partial(quark, "fp4", "per_group", size=32)),
    Case("Quark", "mxfp6", partial(quark, "fp6_e3m2", "per_group", size=32)),
    *(Case("ModelSlim", kind, partial(modelslim, kind)) for kind in ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16")),
    Case("ModelSlim", "W4A16 g128", partial(modelslim, "W4A16", size=128)),
    *(Case("ModelSlim", kind, partial(modelslim, kind)) for kind in ("WFP8AFP8_DYNAMIC", "W4A4_MXFP4")),
    *(Case("ModelOpt", name, partial(modelopt, name)) for name in ("FP8", "NVFP4", "W4A16_AWQ")),
    Case("FP8", "128x128", fp8_block),
    Case("gpt-oss", "mxfp4 experts", gpt_oss),
    *(Case("bitsandbytes", kind, partial(bitsandbytes, kind)) for kind in ("nf4", "nf4 double", "int8")),
    *(Case("torchao", kind, partial(torchao, kind)) for kind in ("Int8Tensor", "Int4Tensor")),
]
