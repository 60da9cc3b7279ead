"""Write a checkpoint in the format of this folder, then open, plan and run it as any other.

Install it first, beside qhal: `pip install --no-deps --no-build-isolation ./examples/add_a_format`
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import qhal
import qhal_schemes
from qhal.encoding import encode

NAME = "model.layers.0.mlp.down_proj"


def write(folder: Path) -> qhal.QTensor:
    """One layer and a plain head; returns what the layer means."""
    g = torch.Generator().manual_seed(0)
    w = encode(torch.randn(48, 64, generator=g), qhal.Format.parse("int4.g32*fp16"))
    code = (w.codes + 8).to(torch.uint8)
    tensors = {f"{NAME}.nibbles": code[:, 0::2] | code[:, 1::2] << 4, f"{NAME}.steps": w.scale}
    save_file(tensors | {"lm_head.weight": torch.zeros(8, 48)}, folder / "model.safetensors")
    section = {"quant_method": "acme4", "group_size": 32, "keep": ["lm_head"]}
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False, "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return w


def main() -> None:
    if "acme4" not in qhal_schemes.known_methods():
        raise SystemExit("acme4 is not installed: pip install --no-deps --no-build-isolation ./examples/add_a_format")
    with tempfile.TemporaryDirectory() as temporary:
        w = write(Path(temporary))
        ckpt = qhal_schemes.open_checkpoint(temporary)
        print(ckpt.format(NAME).weight, dict(ckpt.excluded))
        assert torch.equal(ckpt.dequantize(NAME), w.dequantize())  # the file means what was written, bit for bit

        ops = qhal.select("cpu_reference")
        print(qhal.resolve(ckpt, ops).explain())
        y = ckpt.load_linear(NAME, ops)(torch.ones(2, 64, dtype=torch.bfloat16))
        print(f"y {tuple(y.shape)} {y.dtype}")

        halves = [ckpt.linear_spec(NAME, shard=(1, rank, 2)).stored() for rank in range(2)]
        assert torch.equal(torch.cat(halves, 1), w.dequantize())  # tensor parallelism needed no line of its own
        try:
            ckpt.linear_spec(NAME, shard=(1, 0, 4))
        except qhal.ShardError as refused:
            print(refused)

        file = Path(temporary, "config.json")
        file.write_text(file.read_text().replace('["lm_head"]', "[]"))
        try:
            qhal_schemes.open_checkpoint(temporary)
        except qhal.CheckpointError as refused:
            print(str(refused).removeprefix(f"{file}: "))


if __name__ == "__main__":
    main()
