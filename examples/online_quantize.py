"""Quantize a bf16 checkpoint while it is loaded, or once to disk: the same bits either way.

Round to nearest, no calibration. On disk it is a standard compressed-tensors checkpoint that other engines read.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import qhal_schemes

NAMES = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + ["model.layers.0.mlp.down_proj"]


def write(folder: Path) -> dict[str, torch.Tensor]:
    """A plain bf16 checkpoint of a few Linear layers."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(64, 128, generator=g).bfloat16() for name in [*NAMES, "lm_head"]}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "bf16"
        tensors = write(source)
        print(f"{'format':20} {'bits':>5}  relative error of one weight")
        for format in ("int8", "fp8", "int4_g32", "mxfp4"):
            online = qhal_schemes.open_checkpoint(source, quantize=format)  # nothing is quantized until it is read
            name = NAMES[0]
            w = tensors[f"{name}.weight"].float()
            error = float((online.dequantize(name) - w).norm() / w.norm())
            weight = online.format(name).weight
            print(f"{weight!s:20} {weight.bits:5.2f}  {error:.4f}")

            out = Path(temporary) / format
            qhal_schemes.quantize_checkpoint(source, out, format)
            stored = qhal_schemes.open_checkpoint(out)
            assert stored.method == "compressed-tensors" and set(stored.modules(quantized=True)) == set(NAMES)
            for each in NAMES:
                assert torch.equal(stored.dequantize(each), online.dequantize(each))
        print("on disk and while loading: the same bits, for every format and layer;", *stored.excluded.items())


if __name__ == "__main__":
    main()
