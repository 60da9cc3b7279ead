"""compressed-tensors, in the layout of qhal's own writer; the package's decompressor is the peer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from load_cases import MODULE, Case, Files, Peer, Tensors, raw, scales
from qhal_schemes.compressed_tensors_writer import tensor_layouts
from qhal_schemes.quantizing import resolve_format
from qhal_schemes.source import DTYPES

NAMES = ("int4_g128", "uint4_g128", "int3_g32", "int8_g32", "int8", "fp8_row", "fp8_block", "mxfp8", "mxfp4", "nvfp4")


def peer(section: dict[str, Any]) -> Peer:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = section["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    return lambda tensors: compressor.decompress(dict(tensors), scheme)["weight"]


def make(name: str, n: int, k: int, g: torch.Generator) -> Files:
    layout, tensors = resolve_format(name, torch.bfloat16), Tensors()
    for full, one in tensor_layouts(MODULE, n, k, layout).items():
        dtype, leaf = DTYPES[one.dtype], full.removeprefix(f"{MODULE}.")
        if leaf == "weight_shape":
            tensors[leaf] = torch.tensor([n, k])
        elif dtype.is_floating_point and dtype.itemsize > 1:
            tensors[leaf] = scales(g, *one.shape, dtype=dtype)
        else:
            tensors[leaf] = raw(g, one.nbytes, dtype=dtype).reshape(one.shape)
    section = layout.section([])
    return Files(tensors, section, peer=peer(section))


CASES = [Case("compressed-tensors", name, partial(make, name)) for name in NAMES]
