"""Writes Quark checkpoints in forms that the golden set lacks, and Quark's own dequantization of them.

Needs amd-quark 0.13 (CPU): `python tests/generators/quark_extra.py OUT`. Every case is a folder as the tests expect it:
`checkpoint/`, `expected.safetensors` (`<module>.weight`, float32), `provenance.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.export.api import import_model_from_safetensors
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from quark.torch.quantization.config.config import QConfig, QLayerConfig, QTensorConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 7
BASE: dict[str, object] = {
    "is_dynamic": False, "symmetric": True, "round_method": "half_even", "ch_axis": None, "group_size": None,
    "block_size": None, "scale_format": None, "scale_calculation_mode": None, "scale_type": "float",
    "zero_point_type": "int32", "is_scale_quant": False, "mx_element_dtype": None, "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}  # fmt: skip


def tensor(dtype: str, qscheme: str, observer: str, **more: object) -> QTensorConfig:
    """One tensor's configuration, from the values that config.json shows."""
    return QTensorConfig.from_dict({**BASE, "dtype": dtype, "qscheme": qscheme, "observer_cls": observer, **more})


INT4 = ("int4", "per_group", "PerGroupMinMaxObserver")
MX = {"ch_axis": -1, "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even", "symmetric": None}
CHANNEL = ("per_channel", "PerChannelMinMaxObserver")
INT8_TOKEN = tensor("int8", *CHANNEL, ch_axis=1, is_dynamic=True)
CASES = {
    "int4_group32_order": ("order", tensor(*INT4, ch_axis=-1, group_size=32), None),
    "int4_group32_int8_token": ("reorder", tensor(*INT4, ch_axis=-1, group_size=32), INT8_TOKEN),
    "uint4_channel_order": ("order", tensor("uint4", *CHANNEL, ch_axis=0, symmetric=False), None),
    "int8_group32": ("reorder", tensor("int8", "per_group", INT4[2], ch_axis=-1, group_size=32), None),
    "mxfp6_e2m3": ("reorder", tensor("fp6_e2m3", "per_group", "PerBlockMXObserver", **MX), None),
}


def model() -> LlamaForCausalLM:
    """One layer with random weights and strong columns."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    found = LlamaForCausalLM(config).bfloat16().eval()
    for p in found.parameters():
        if p.dim() == 2:
            p.data[:, ::17] *= 8
    return found


def write(name: str, out: Path) -> None:
    """One case."""
    pack_method, weight, inputs = CASES[name]
    config = QConfig(global_quant_config=QLayerConfig(weight=weight, input_tensors=inputs), exclude=["lm_head"])
    quantizer = ModelQuantizer(config)
    ids = [torch.randint(0, 32, (1, 8)) for _ in range(2)]
    quantized = quantizer.freeze(quantizer.quantize_model(model(), ids))
    folder = out / name / "checkpoint"
    folder.mkdir(parents=True)
    with torch.no_grad():
        export_safetensors(
            quantized, str(folder), custom_mode="quark", weight_format="real_quantized", pack_method=pack_method
        )
    reloaded = import_model_from_safetensors(model(), str(folder))
    weights = {
        f"{n}.weight": m._get_qweight(m.weight).detach().float().contiguous()
        for n, m in reloaded.named_modules()
        if isinstance(m, QParamsLinear)
    }
    save_file(weights, out / name / "expected.safetensors")
    about = {"family": "quark", "case": name, "peer": "amd-quark 0.13", "peer_written": True, "seed": SEED}
    (out / name / "provenance.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        write(case, Path(sys.argv[1]))
