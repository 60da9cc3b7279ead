"""Writes tests/golden/modelslim/wrapped_mixed_attention with msmodelslim's own modules and saver, on a CPU.

    pip install --no-deps msmodelslim==26.1.0 pygtrie wcmatch bracex scipy
    python tests/generators/modelslim_wrappers.py OUT

What the tool's quantizers make is wrapped by hand: a low-rank branch (svd_lowrank_l1, _l2) around W4A4_MXFP4,
smoothing that is not fused (div.mul_scale, names under .linear) around W8A8 and around a float weight, and attention
operands of three kinds: q in MXFP4 blocks, k in int8 with a scale per token, v in int8 with a static scale per head.
Expected values are the modules' own forward passes in float32; output_device is integer arithmetic on the stored
tensors of W8A8, which rounds the bias. (Of FP8 operands the tool clamps values and rounds none.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from msmodelslim import ir
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config, AscendV1Saver
from msmodelslim.core.quant_service.modelslim_v1.save.interface import AscendV1GlobalModelDtypeInterface
from msmodelslim.core.quantizer.base import QConfig
from msmodelslim.core.quantizer.linear import LinearQConfig, LinearQuantizer
from msmodelslim.ir.api import calculate_qparam
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope
from msmodelslim.model.interface import IModel
from safetensors.torch import load_file, save_file
from torch import nn

HIDDEN, HEADS, KV_HEADS, DIM, RANK = 64, 2, 2, 32, 3
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": DIM, "num_hidden_layers": 1, "vocab_size": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
STATIC = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
MX = QConfig(dtype="mxfp4", scope="per_block", symmetric=True, method="minmax", ext={"axes": -1})
INT8_IN = QConfig(dtype="int8", scope="per_tensor", symmetric=False, method="minmax")
INT8_W = QConfig(dtype="int8", scope="per_channel", symmetric=True, method="minmax")


class Adapter(IModel, AscendV1GlobalModelDtypeInterface):
    """What the saver asks of a model adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    model_type = property(lambda self: "llama")
    model_path = property(lambda self: self.folder)
    trust_remote_code = property(lambda self: False)

    def get_global_model_torch_dtype(self) -> torch.dtype:
        return torch.bfloat16


def inputs(rows: int, g: torch.Generator) -> torch.Tensor:
    """Rows with a few outlier columns."""
    return torch.randn(rows, HIDDEN, generator=g) * torch.where(torch.arange(HIDDEN) % 13 == 0, 8.0, 1.0)


def quantized(weight: torch.Tensor, bias: torch.Tensor | None, config: LinearQConfig, x: torch.Tensor) -> nn.Module:
    """The tool's quantizer, calibrated and deployed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    q = LinearQuantizer(config)
    q.setup(linear)
    q(x)
    return q.deploy()


def low_rank(g: torch.Generator) -> tuple[nn.Module, torch.Tensor]:
    """A residual in MXFP4 beside the leading directions of a weight."""
    w = torch.randn(HIDDEN, HIDDEN, generator=g) * 0.1 + 2 * torch.outer(*torch.randn(2, HIDDEN, generator=g)) / 8
    u, s, vt = torch.linalg.svd(w)
    l1, l2 = vt[:RANK].contiguous(), (u[:, :RANK] * s[:RANK]).contiguous()
    inner = quantized(w - l2 @ l1, None, LinearQConfig(act=MX, weight=MX), inputs(16, g))
    return ir.SVDResidualWrapper(inner, l1, l2), w


def smoothed(g: torch.Generator, quantize: bool) -> nn.Module:
    """A weight scaled per column, and its input by the reciprocal."""
    scales = torch.rand(HIDDEN, generator=g) * 3 + 0.25
    w, x = torch.randn(HIDDEN, HIDDEN, generator=g) * 0.1 * scales, inputs(16, g)
    bias = torch.randn(HIDDEN, generator=g)
    if quantize:
        inner = quantized(w, bias, LinearQConfig(act=INT8_IN, weight=INT8_W), x / scales)
    else:
        inner = nn.Linear(HIDDEN, HIDDEN, bias=False)
        inner.weight.data = w
    return ir.NonFusionSmoothQuantWrapper(scales, inner)


def per_head(x: torch.Tensor) -> nn.Module:
    """int8 with one static scale per head; x [batch, heads, tokens, features]."""
    flat = x.movedim(1, 0).flatten(1)
    return ir.INT8FakeQuantActivationPerHead(
        calculate_qparam(flat.amin(1), flat.amax(1), QDType.INT8, QScope.PER_HEAD, True)
    )


def main(out: Path) -> None:
    g = torch.Generator().manual_seed(71)
    source, checkpoint = out / "source", out / "checkpoint"
    source.mkdir(parents=True)
    checkpoint.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG, indent=2))
    model, layer, attention, mlp = nn.Module(), nn.Module(), nn.Module(), nn.Module()
    model.model, model.model.layers = nn.Module(), nn.ModuleList([layer])
    layer.self_attn, layer.mlp = attention, mlp
    attention.o_proj = low_rank(g)[0]
    mlp.up_proj, mlp.down_proj = smoothed(g, True), smoothed(g, False)
    states = {n: torch.randn(1, h, 3, DIM, generator=g) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    attention.fa_q = ir.FakeQuantActivationPerBlock(QParam(QScheme(QScope.PER_BLOCK, QDType.MXFP4, True)))
    attention.fa_k = ir.FakeQuantActivationPerToken(QParam(QScheme(QScope.PER_TOKEN, QDType.INT8, True)))
    attention.fa_v = per_head(states["v"])

    expected: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in (("self_attn.o_proj", attention.o_proj), ("mlp.up_proj", mlp.up_proj),
                             ("mlp.down_proj", mlp.down_proj)):  # fmt: skip
            x = inputs(5, g)
            expected[f"model.layers.0.{name}.input"], expected[f"model.layers.0.{name}.output"] = x, module(x)
        for name, x in states.items():
            stem = f"model.layers.0.self_attn.fa_{name}"
            expected[f"{stem}.input"], expected[f"{stem}.output"] = x, getattr(attention, f"fa_{name}")(x)
        eye = torch.eye(HIDDEN)
        expected["model.layers.0.self_attn.o_proj.weight"] = weight_of(attention.o_proj.wrapped_module)
        expected["model.layers.0.mlp.up_proj.weight"] = weight_of(mlp.up_proj.wrapped_module)
        expected["model.layers.0.mlp.down_proj.weight"] = mlp.down_proj.wrapped_module(eye).T
        saver = AscendV1Saver(model, AscendV1Config(save_directory=str(checkpoint), part_file_size=0), Adapter(source))
        saver.post_run()
    stored = load_file(checkpoint / "quant_model_weights.safetensors")
    t = {name: stored[f"model.layers.0.mlp.up_proj.linear.{name}"] for name in STATIC}
    x = expected["model.layers.0.mlp.up_proj.input"] * stored["model.layers.0.mlp.up_proj.div.mul_scale"]
    codes = torch.clamp(torch.round(x / t["input_scale"] + t["input_offset"]), -128, 127)
    device = (codes.double() @ t["weight"].double().T + t["quant_bias"]) * t["deq_scale"].double()
    expected["model.layers.0.mlp.up_proj.output_device"] = device
    save_file({k: t.detach().float().contiguous() for k, t in expected.items()}, out / "expected.safetensors")
    provenance = {
        "family": "modelslim", "case": "wrapped_mixed_attention", "peer": "msmodelslim 26.1.0", "peer_written": True,
        "seed": 71, "torch": torch.__version__, "produced_by": "tests/generators/modelslim_wrappers.py",
        "expected_by": "the modules' own forward passes in float32",
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2))
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


def weight_of(module: nn.Module) -> torch.Tensor:
    """The tool's dequantized weight: (q - 0) * scale per row, or per block of 32."""
    scale = module.weight_scale.float()
    if scale.dim() == 1:
        return module.weight.float() * scale[:, None]
    blocks = module.weight.float().unflatten(-1, (-1, 32)) * torch.exp2(scale.reshape(HIDDEN, -1, 1))
    return blocks.flatten(-2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
