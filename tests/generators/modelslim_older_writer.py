"""Writes tests/golden/modelslim/older_writer and older_writer_packed with msmodelslim's older writer, on a CPU.

    pip install --no-deps msmodelslim==26.1.0 pygtrie wcmatch bracex scipy einops easydict
    python tests/generators/modelslim_older_writer.py OUT

Codes, packing, correction sums and the description are the tool's (ComplexQuantifier, fake_quantize_save,
QuantModelJsonDescription); scales are chosen here, and the files laid out as its savers do: with a version, int4 codes
in pairs; without, one in a byte, and the type in the files' names. Expected weights are the tool's codes, before it
packs them, times the scales in its order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.llm_ptq_utils import QuantModelJsonDescription, QuantType
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.save import complex_quantifier as tool
from safetensors.torch import save_file
from torch import Tensor

SIZE, GROUP = 64, 32
CONFIG = {
    "model_type": "llama", "hidden_size": SIZE, "intermediate_size": SIZE, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
SECOND = "weight_scale_second"


def module(weight: Tensor, kind: QuantType, bits: int, group: int, planes: dict[str, Tensor]) -> torch.nn.Module:
    """A quantizer of the tool as calibration leaves it."""
    m = tool.LowBitLinearQuantizer.__new__(tool.LowBitLinearQuantizer)
    torch.nn.Module.__init__(m)
    m.weight, m.fp_weight, m.bias, m.disable_input = torch.nn.Parameter(weight), weight, None, False
    m.quant_weight = SimpleNamespace(is_enable=True, **planes)
    m.cfg = SimpleNamespace(is_stage_quant=SECOND in planes, model_quant_type=kind, w_bit=bits, group_size=group)
    return m


def asymmetric(w: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """int4 with offsets: planes, and the decoded weight."""
    blocks = w.reshape(SIZE, -1, group)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = (high - low) / 15
    offset = torch.round(-low / scale) - 8
    rows = SIZE if group == SIZE else -1
    codes = tool.fake_quantize_save(
        w, scale.reshape(rows, 1), offset.reshape(rows, 1), bit=4, group_size=-1 if group == SIZE else group
    )[0]
    decoded = (codes.float().reshape(blocks.shape) - offset[..., None]) * scale[..., None]
    return {"weight_scale": scale, "weight_offset": offset}, decoded.reshape(w.shape)


def two_stages(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """int8 per row, then int4 per group of the int8 codes."""
    first = w.abs().amax(1, keepdim=True) / 127
    eight = tool.fake_quantize_save(w, first, torch.zeros_like(first), bit=8)[0].float()
    second = eight.reshape(-1, GROUP).abs().amax(1, keepdim=True) / 7
    four = tool.fake_quantize_save(eight, second, torch.zeros_like(second), bit=4, group_size=GROUP)[0].float()
    decoded = (four.reshape(-1, GROUP) * second).reshape(w.shape) * first
    planes = {"weight_scale": first, "weight_offset": torch.zeros_like(first), SECOND: second}
    return planes | {"weight_offset_second": torch.zeros_like(second)}, decoded


def write(out: Path, packed: bool) -> None:
    """One checkpoint and what it decodes to."""
    torch.manual_seed(72)
    settings = SimpleNamespace(pdmix=False, use_fa_quant=False)
    writer = tool.ComplexQuantifier(settings, [], torch.bfloat16, None, packed)
    version = "1.0.0" if packed else None
    description = QuantModelJsonDescription(QuantType.W4A16, version_name=version, group_size=GROUP)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, kind, bits, group in (
        ("self_attn.o_proj", QuantType.W4A16, 4, SIZE),
        ("mlp.up_proj", QuantType.W4A16, 4, GROUP),
        ("mlp.down_proj", QuantType.W4A8_DYNAMIC, 4, GROUP),
    ):
        stem, w = f"model.layers.0.{name}", torch.randn(SIZE, SIZE)
        planes, decoded = two_stages(w) if kind == QuantType.W4A8_DYNAMIC else asymmetric(w, group)
        made = module(w, kind, bits, group if group < SIZE else -1, planes)
        for full, own, tensor in writer.generate_weight_of_linear_module(stem, made, kind):
            tensors[full] = tensor.detach().clone().contiguous()
            description.change_weight_type(full, own)
        expected[f"{stem}.weight"] = decoded
    checkpoint = out / "checkpoint"
    checkpoint.mkdir(parents=True)
    suffix = "" if packed else "_w4a16"
    (checkpoint / "config.json").write_text(json.dumps(CONFIG, indent=2))
    text = json.dumps(description.quant_model_description, indent=2)
    (checkpoint / f"quant_model_description{suffix}.json").write_text(text)
    save_file(tensors, checkpoint / "quant_model_weight_w4a16.safetensors")
    save_file({k: t.float().contiguous() for k, t in expected.items()}, out / "expected.safetensors")
    provenance = {
        "family": "modelslim",
        "case": out.name,
        "peer": "msmodelslim 26.1.0",
        "peer_written": "tensors and description",
        "seed": 72,
        "torch": torch.__version__,
        "produced_by": "tests/generators/modelslim_older_writer.py",
        "expected_by": "the tool's codes before packing, times its scales",
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    for packed in (True, False):
        write(Path(sys.argv[1]) / f"older_writer{'_packed' if packed else ''}", packed)
