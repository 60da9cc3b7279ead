"""Reads checkpoints that `qhal convert` wrote as Quark and ModelOpt with amd-quark and nvidia-modelopt, on a CPU.

    pip install --no-deps amd-quark==0.13 nvidia-modelopt==0.47.0 scipy onnx onnxslim ml_dtypes omegaconf \\
        antlr4-python3-runtime==4.9.3 pulp
    python tests/generators/converted_by_peers.py GOLDEN OUT

Quark: its importer loads the folder into the model of transformers and unpacks every weight. ModelOpt has no importer:
its storage classes unpack the tensors, its packers make int4, FP8 per channel and tiles again from the decoded weights
(those have no unpacker there), and its own conversion of hf_quant_config.json is compared with what stands in
config.json. Prints one line for every source and target, with what differs.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import qhal_schemes
from qhal.errors import CheckpointError
from qhal_schemes.checkpoint import Checkpoint
from qhal_schemes.convert import convert_checkpoint

warnings.simplefilter("ignore")
FAMILIES = (
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "fp8_block",
    "gptq",
    "modelopt",
    "modelslim",
    "quark",
    "torchao",
)


def by_quark(folder: Path, ckpt: Checkpoint) -> int:
    """Weights that amd-quark's importer finds in the folder, compared with qhal's; their number."""
    from quark.torch.export.api import import_model_from_safetensors

    config = transformers.AutoConfig.from_pretrained(folder)
    plain = transformers.AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(plain, dtype=ckpt.dtype)
    model.config = config
    if "Moe" in type(model).__name__:
        from quark.torch.utils.llm import preprocess_for_quantization

        preprocess_for_quantization(model)
    model = import_model_from_safetensors(model, str(folder))
    modules = dict(model.named_modules())
    for name in ckpt.modules(quantized=True):
        layer: Any = modules[name]
        found = layer._get_qweight(layer.weight).float()
        wanted = ckpt.stored(name)
        if not torch.equal(found + 0.0, wanted + 0.0):
            raise SystemExit(f"{folder}: {name}: differs by {float((found - wanted).abs().max()):g}")
    return len(ckpt.modules(quantized=True))


def by_modelopt(folder: Path, ckpt: Checkpoint) -> int:
    """Weights that nvidia-modelopt's storage classes unpack or pack, compared with qhal's; their number."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import from_quantized_weight, to_quantized_weight
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    said = convert_hf_quant_config_format(json.loads((folder / "hf_quant_config.json").read_text()))
    for key in ("quant_method", "quant_algo", "ignore", "kv_cache_scheme", "producer"):
        if said.get(key) != section.get(key):
            raise SystemExit(
                f"{folder}: {key}: {section.get(key)} in config.json, ModelOpt would write {said.get(key)}"
            )
    count = 0
    for name in ckpt.modules(quantized=True):
        f, wanted = ckpt.format(name), ckpt.stored(name)
        t = {leaf: ckpt.tensor(f"{name}.{leaf}") for leaf in ("weight", "weight_scale")}
        shape, block = torch.Size((f.n, f.k)), str(f.weight)
        if block.startswith("e2m1") and "e8m0" in block:
            found = MXFP4QTensor(shape, torch.float32, t["weight"]).dequantize(
                torch.float32, scale=t["weight_scale"], block_sizes={-1: 32}
            )
        elif block.startswith("e2m1"):
            found = NVFP4QTensor(shape, torch.float32, t["weight"]).dequantize(
                torch.float32,
                scale=t["weight_scale"],
                double_scale=ckpt.tensor(f"{name}.weight_scale_2"),
                block_sizes={-1: 16},
            )
        elif "e8m0" in block:
            found = MXFP8QTensor(shape, torch.float32, t["weight"]).dequantize(torch.float32, scale=t["weight_scale"])
        elif block.startswith("e4m3fn.tensor"):
            found = from_quantized_weight(t["weight"], t["weight_scale"], "fp8", torch.float32)
        elif block.startswith("int8"):
            found = from_quantized_weight(t["weight"], t["weight_scale"], "int8_wo", torch.float32)
        else:
            form = {"int4": "int4_awq", "e4m3fn.row": "fp8_pc_pt"}.get(block.split(".g")[0].split("*")[0], "fp8_pb_wo")
            group = f.weight.block.cols if form != "fp8_pc_pt" else None
            codes = to_quantized_weight(wanted, t["weight_scale"], form, block_size=group)
            if not torch.equal(_zeros(codes), _zeros(t["weight"])):
                raise SystemExit(f"{folder}: {name}: ModelOpt packs it differently")
            count += 1
            continue
        if not torch.equal(found.reshape(shape) + 0.0, wanted + 0.0):
            raise SystemExit(f"{folder}: {name}: differs by {float((found - wanted).abs().max()):g}")
        count += 1
    return count


def _zeros(codes: torch.Tensor) -> torch.Tensor:
    """Float8 codes with one zero, bytes as they are."""
    return codes.float() + 0.0 if codes.dtype == torch.float8_e4m3fn else codes.view(torch.uint8)


def main(golden: Path, out: Path) -> None:
    """Every source that converts exactly, by both tools."""
    for source in sorted(p / "checkpoint" for family in FAMILIES for p in (golden / family).iterdir()):
        for to, read in (("quark", by_quark), ("modelopt", by_modelopt)):
            folder = out / f"{source.parent.parent.name}-{source.parent.name}-{to}"
            shutil.rmtree(folder, ignore_errors=True)
            try:
                convert_checkpoint(source, folder, to)
            except CheckpointError:
                continue
            ckpt = qhal_schemes.open_checkpoint(folder)
            try:
                read_modules = read(folder, ckpt)
                print(f"{folder.name}: {read_modules} of {len(ckpt.modules(quantized=True))} weights the same")
            except (Exception, SystemExit) as bad:
                print(f"{folder.name}: {type(bad).__name__}: {str(bad)[:400]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
