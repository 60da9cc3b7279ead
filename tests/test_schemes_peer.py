"""Against the peer's own code: files that the installed compressed-tensors package writes decode to what it decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qhal_schemes import open_checkpoint

compressed_tensors = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

Write = Callable[..., Path]
MODULE = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_integers(write_checkpoint: Write, bits: int, symmetric: bool) -> None:
    n, k, size = 48, 128, 32
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=size, symmetric=symmetric)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(bits))
    groups = w.unflatten(-1, (-1, size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": w, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = zero
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    ckpt = open_checkpoint(write_checkpoint({f"{MODULE}.{name}": t for name, t in stored.items()}, config))
    assert torch.equal(ckpt.dequantize(MODULE), compressor.decompress(stored, scheme)["weight"].float())
