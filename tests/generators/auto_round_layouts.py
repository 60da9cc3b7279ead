"""Writes tests/golden/auto_round with auto-round's own quantizer, exporter and layers, on a CPU.

    pip install auto-round==0.16.1 tokenizers
    python tests/generators/auto_round_layouts.py OUT

Rounding to nearest without tuning (iters=0), as only layouts matter here. Expected weights are the layers that
auto-round itself packs and unpacks with (qlinear_torch, qlinear_torch_zp, dequantize_gemm), applied to unit vectors in
float32: they round scale times code to float16. Outputs are x times these weights, plus the bias, in float32.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

DOWN, Q = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq_b4_g32_mixed": ("auto_round:auto_gptq", {"bits": 4, "layer_config": {DOWN: {"bits": 8}, Q: {"bits": 16}}}),
    "gptq_b2_row_sym": ("auto_round", {"bits": 2, "sym": True, "group_size": -1}),
    "raw_b3_g32": ("auto_round", {"bits": 3}),
    "raw_b5_g32": ("auto_round", {"bits": 5}),
    "gptqmodel_b4_g32_pattern": ("auto_round:gptqmodel", {"bits": 4, "layer_config": {"down_proj": {"bits": 2}}}),
    "awq_b4_g32": ("auto_round:auto_awq", {"bits": 4, "layer_config": {DOWN: {"bits": 16}}}),
}


def model() -> transformers.PreTrainedModel:
    """One layer with biases at q, k and v; groups of weights lie around different middles."""
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    made = transformers.Qwen2ForCausalLM(config).half().eval()
    for name, p in made.named_parameters():
        if "proj" in name:
            middle = torch.randn(p.shape[0], *[1] * (p.dim() - 1), generator=g) * 0.05
            p.data = (torch.randn(p.shape, generator=g) * 0.1 + middle).half()
    return made


def settings(config: dict[str, Any], module: str) -> dict[str, Any]:
    """bits and group size of a module, by the rules of auto_round/inference."""
    extra = config.get("extra_config", {})
    found = extra.get(module) or next((v for k, v in extra.items() if re.search(k, module)), {})
    return {"bits": config["bits"], "group_size": config["group_size"], **found}


def unpacked(config: dict[str, Any], module: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, K] float32 by the tool's own layer."""
    s, layout = settings(config, module), config["packing_format"]
    k = t["qweight"].shape[0] if "awq" in layout else t["qweight"].shape[0] * 32 // s["bits"]
    size = k if s["group_size"] == -1 else s["group_size"]
    if "awq" in layout:
        return dequantize_gemm(t["qweight"], t["qzeros"], t["scales"], s["bits"], size).t().float()
    zp = layout == "auto_round:auto_gptq"
    if "g_idx" in t:  # written for gptqmodel; auto-round's own layer mistakes its length for the rows
        assert torch.equal(t["g_idx"].long(), torch.arange(k) // size)
    layer = (qlinear_torch_zp if zp else qlinear_torch).QuantLinear(s["bits"], size, k, t["scales"].shape[1], False)
    layer.load_state_dict({key: v for key, v in t.items() if key not in ("bias", "g_idx")})
    return layer(torch.eye(k)).t().float()


def write(out: Path, layout: str, scheme: dict[str, Any]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32)}, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    scheme = {"group_size": 32, "sym": False, "iters": 0, "disable_opt_rtn": True, **scheme}
    AutoRound(model(), tokenizer=tokenizer, **scheme).quantize_and_save(str(out / "all"), format=layout)
    folder = next((out / "all").rglob("config.json")).parent
    (out / "checkpoint").mkdir()
    for name in ("config.json", "quantization_config.json", "model.safetensors"):
        shutil.copy(folder / name, out / "checkpoint" / name)
    shutil.rmtree(out / "all")
    config = json.loads((out / "checkpoint" / "config.json").read_text())["quantization_config"]
    tensors, expected, hashes = load_file(out / "checkpoint" / "model.safetensors"), {}, {}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            parts = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{module}.")}
            w = expected[f"{module}.weight"] = unpacked(config, module, parts).contiguous()
            hashes[f"{module}.weight"] = hashlib.sha256(w.numpy().astype("<f4").tobytes()).hexdigest()
            x = torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(1))
            bias = parts["bias"].float() if "bias" in parts else 0
            expected[f"{module}.input"], expected[f"{module}.output"] = x, x @ w.t() + bias
    save_file(expected, out / "expected.safetensors")
    provenance = {
        "peer": {"auto-round": "0.16.1", "transformers": transformers.__version__, "torch": torch.__version__},
        "produced_by": "tests/generators/auto_round_layouts.py", "format": layout, "config": config,
        "expected_from": {"*.weight": "auto-round's own layers on unit vectors", "*.output": "torch, float32"},
        "verify": {"best": {"peer_value_precision": "float16"}}, "weight_sha256": hashes,
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    for case, (layout, scheme) in CASES.items():
        write(Path(sys.argv[1]) / case, layout, scheme)
