"""Writes tests/golden/modelslim/command_mixed with msmodelslim's own command, `msmodelslim quant`, on a CPU.

    pip install -r examples/modelslim/requirements.txt
    python tests/generators/modelslim_command.py OUT

A two-layer Llama of random bf16 weights with outlier columns; layer 0 is W8A8 but for down_proj, which is W8A8_DYNAMIC
as attention of layer 1, whose other linears are W4A8_DYNAMIC. The checkpoint is what the command leaves, without the
tokenizer. The command computes scales in the model's bf16. Expected weights are the tool's dequantize() of the codes
that it saved, in float32 and with the file's scales; inputs are those of the float model; `output` is the tool's module
in float32; `output_per_token` has a scale per token where that module takes one per feature, and `output_device` is the
integer path of static W8A8 from the stored tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from msmodelslim.cli.__main__ import main as command
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Saver
from msmodelslim.ir.api import calculate_qparam, dequantize, fake_quantize, quantize
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

SEED, VOCABULARY, TOKENS = 91, 64, 8
RECIPE = """
apiversion: modelslim_v1
spec:
  dataset: calibration.json
  runner: model_wise
  process:
    - type: linear_quant
      qconfig: {{act: {static}, weight: {int8}}}
      include: ["model.layers.0.*"]
      exclude: ["*down_proj"]
    - type: linear_quant
      qconfig: {{act: {dynamic}, weight: {int8}}}
      include: ["model.layers.0.*down_proj", "model.layers.1.self_attn.*"]
    - type: linear_quant
      qconfig: {{act: {dynamic}, weight: {int4}}}
      include: ["model.layers.1.mlp.*"]
  save:
    - {{type: ascendv1_saver, part_file_size: 4}}
""".format(
    static="{scope: per_tensor, dtype: int8, symmetric: false, method: minmax}",
    dynamic="{scope: per_token, dtype: int8, symmetric: true, method: minmax}",
    int8="{scope: per_channel, dtype: int8, symmetric: true, method: minmax}",
    int4="{scope: per_channel, dtype: int4, symmetric: true, method: minmax}",
)


def model() -> transformers.LlamaForCausalLM:
    """bf16; every eighth input column of a weight is five times as large."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, p in made.named_parameters():
        if name.endswith("_proj.weight"):
            p.data = torch.randn(p.shape) * 0.1
            p.data[:, ::8] *= 5
            p.data = p.data.to(torch.bfloat16)
    return made


def float_inputs(made: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    """What every quantized linear reads in the float model, [TOKENS, K] float32."""
    found: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].detach()[0].float()}))
        for name, m in made.named_modules()
        if name.endswith("_proj")
    ]
    with torch.inference_mode():
        made((torch.arange(TOKENS) * 29 % VOCABULARY)[None])
    for hook in hooks:
        hook.remove()
    return found


def decoded(module: torch.nn.Module, scale: Tensor) -> Tensor:
    """[N, K] float32 by the tool, of the module's codes."""
    kind = QDType.INT4 if "W4A8" in type(module).__name__ else QDType.INT8
    parameters = QParam(scheme=QScheme(scope=QScope.PER_CHANNEL, dtype=kind, symmetric=True), ext={"scale": scale})
    return dequantize(QStorage(dtype=kind, value=module.weight.data).T, parameters).T.value


def dynamic(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """With one scale per token, by the tool's functions: they take one per column, so x goes in turned."""
    weight = decoded(module, module.weight_scale)
    parameters = calculate_qparam(x.T.amin(0), x.T.amax(0), QDType.INT8, QScope.PER_TOKEN, True)
    q = fake_quantize(QStorage(QDType.FLOAT, x.T), parameters).value.T
    return {"weight": weight, "input": x, "output": module(x), "output_per_token": q @ weight.T}


def static(module: torch.nn.Module, x: Tensor, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the file's scales: their product was rounded to bf16, so that the module's own weight is another one."""
    scheme = QScheme(scope=QScope.PER_TENSOR, dtype=QDType.INT8, symmetric=False)
    given = QParam(scheme=scheme, ext={"scale": stored["input_scale"], "offset": stored["input_offset"]})
    q = quantize(QStorage(QDType.FLOAT, x), given).value.double()
    sums = q @ stored["weight"].double().T + stored["quant_bias"]
    weight = decoded(module, stored["deq_scale"] / stored["input_scale"])
    device = sums.float() * stored["deq_scale"]
    return {"weight": weight, "input": x, "output": module(x), "output_device": device}


def main(out: Path) -> None:
    """One case folder."""
    made = model()
    inputs = float_inputs(made)
    kept: list[torch.nn.Module] = []
    write = AscendV1Saver.post_run
    AscendV1Saver.post_run = lambda self: (kept.append(self.model), write(self))[1]
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        made.save_pretrained("float")
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1").save_pretrained("float")
        text = [" ".join(f"t{i * k % VOCABULARY}" for i in range(1, 33)) for k in (3, 5, 7, 11)]
        Path("calibration.json").write_text(json.dumps(text))
        Path("recipe.yaml").write_text(RECIPE)
        options = "--model_type default --model_path float --save_path saved --device cpu --config_path recipe.yaml"
        sys.argv = ["msmodelslim", "quant", *options.split()]
        command()
        checkpoint = out / "checkpoint"
        checkpoint.mkdir(parents=True)
        for file in [Path("saved/config.json"), *Path("saved").glob("quant_model_*")]:
            shutil.copy(file, checkpoint / file.name)
            (checkpoint / file.name).chmod(0o644)
    stored = {k: t for file in checkpoint.glob("*.safetensors") for k, t in load_file(file).items()}
    expected: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, x in inputs.items():
            module = kept[0].get_submodule(name).float()
            own = {k.rpartition(".")[2]: t for k, t in stored.items() if k.startswith(f"{name}.")}
            found = static(module, x, own) if "deq_scale" in own else dynamic(module, x)
            expected |= {f"{name}.{key}": t.float().contiguous() for key, t in found.items()}
    save_file(expected, out / "expected.safetensors")
    (out / "expected.safetensors").chmod(0o644)
    provenance = {
        "family": "modelslim", "case": out.name, "peer": "msmodelslim 26.1.0", "peer_written": True, "seed": SEED,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "produced_by": "tests/generators/modelslim_command.py: msmodelslim quant --model_type default --device cpu",
        "recipe": RECIPE, "expected_by": "msmodelslim.ir: the modules it saved, and its dequantize() and quantize()",
        "notes": ["scales are bf16 numbers; deq_scale, their product, was rounded to bf16 again before it was stored"],
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() / "command_mixed")
