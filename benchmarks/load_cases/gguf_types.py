"""GGUF: one weight of each block type, random bytes with sane scales; the gguf package's decoder is the peer.

The decoder ends in float32, and so it does here.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch

from load_cases import Case, Files, Tensors

Kind = gguf.GGMLQuantizationType
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (),
}  # fmt: skip
"""Where a block holds numbers in half precision."""


def make(name: str, n: int, k: int, g: torch.Generator) -> Files:
    kind = Kind[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 170, (n, k // elements, nbytes), generator=g, dtype=torch.uint8)
    for at in HALVES[name]:
        blocks[..., at : at + 2] = torch.full((1,), 0.01).half().view(torch.uint8)
    if name == "TQ2_0":
        blocks[..., :64] &= 0b10101010
    data = blocks.flatten(1).numpy()
    place = {}

    class Written(Files):
        def write(self, folder: Path) -> Path:
            path = folder / "model.gguf"
            w = gguf.GGUFWriter(path, "llama")
            facts = {"block_count": 1, "context_length": 128, "embedding_length": n, "feed_forward_length": k}
            facts |= {"attention.head_count": 32, "attention.head_count_kv": 8, "vocab_size": 40}
            for key, value in facts.items():
                w.add_uint32(f"llama.{key}", value)
            w.add_uint32("llama.rope.dimension_count", n // 32)
            w.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            w.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=kind)
            w.write_header_to_file()
            w.write_kv_data_to_file()
            w.write_tensors_to_file()
            w.close()
            place["start"] = path.stat().st_size - -(-data.nbytes // 32) * 32  # tensors are padded to 32 bytes
            return path

    def read(folder: Path) -> Tensors:
        whole = np.memmap(folder / "model.gguf", np.uint8, "r", place["start"], data.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not writable
            return {"weight": torch.from_numpy(whole)}

    def peer(t: Tensors) -> object:
        return gguf.dequantize(t["weight"].numpy(), kind)

    return Written({"weight": torch.from_numpy(data)}, read=read, peer=peer)


CASES = [Case("GGUF", name, partial(make, name)) for name in HALVES]
