"""Golden checkpoints: every case of every family decodes to its tool's own numbers, bit for bit, and computes them.

A new family is one word in FAMILIES; what its tool does differently from the others is a line in one of the tables.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qhal_schemes
from qhal import rotations
from qhal.encoding import encode
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal_schemes.evidence import Form, cache_form, compared_forms, form
from qhal_schemes.gguf_blocks import TYPES

FAMILIES = (
    "compressed_tensors", "awq", "gptq", "modelopt", "bitsandbytes", "torchao", "modelslim", "quark", "fp8_block",
    "mxfp4_gptoss", "aqlm", "vptq", "auto_round",
)  # fmt: skip
ELSEWHERE = ("quip", "rotations", "gguf")
"""Families compared by tests of their own: test_schemes_golden_codebooks, test_schemes_golden_rotations,
test_schemes_gguf. Evidence is held to their cases too."""
SHIPPED = ("auto-round", "gguf")
"""Methods of which everything that is compared comes with the tests: their lists are held in both directions always."""
NEAR = {"int8.row*(fp32.tensor/fp32)": 1e-6, "int4.g32*(fp32.row*fp32)": 1e-6}
"""Weight formats whose float32 arithmetic is not the tool's own: the file holds the product of the weight's scale with
another one, divided here; two scales are multiplied with each other first, by the tool with the code first."""
BF16_RULE = ("compressed_tensors",)
"""Tools that compute scale, quotient and product of a quantized input or cache in bf16; the others in fp32."""
QUANTIZES_INPUT = ("quark", "modelslim", "modelopt")
"""Tools whose `output` is the product with the input that they quantized, also where no `input_qdq` stands beside."""
ROUNDS_TERMS = ("bitsandbytes", "torchao")
"""Tools whose bf16 kernels on a processor round terms before the sum, at two places (block scale, product)."""
DECODES_TO = {"auto_round": torch.float16}
"""Tools whose layers decode weights to one dtype, whatever the result's is; the others decode to that."""
BESIDE = {"output_per_token": False, "output_device": None, "output_decode": True, "output_clip_once": False}
"""Outputs that stand beside `output` where the tool's CPU result is not what its scheme means on a device: whether it
is that of decoding (None: of the static input, whichever step has it)."""
DECIDED_BY_THE_BATCH = ("bitsandbytes/int8_llm_int8",)
"""Cases whose inputs are quantized but for columns that the batch decides: see test_schemes_bitsandbytes.py."""
CACHED = {"k_scale": "k", "key_states": "k", "fa_k": "k", "v_scale": "v", "value_states": "v", "fa_v": "v", "fa_q": "q"}
"""Fixtures [batch, heads, tokens, features] of an attention module, and the operand that quantizes them."""
PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as f:
        return list(f.keys())


def having(*ends: str) -> list[str]:
    """Cases with a fixture of one of these endings."""
    return [c for c, names in NAMES.items() if any(name.endswith(ends) for name in names)]


CASES = golden_cases.cases(*FAMILIES)
NAMES = {c: read_keys(golden_cases.path(c) / "expected.safetensors") for c in CASES}


def family(case: str) -> str:
    return case.partition("/")[0]


def opened(case: str) -> tuple[qhal_schemes.Checkpoint, dict[str, torch.Tensor]]:
    folder = golden_cases.path(case)
    return qhal_schemes.open_checkpoint(folder / "checkpoint"), load_file(folder / "expected.safetensors")


def precision(provenance: dict[str, Any]) -> torch.dtype:
    """The dtype in which the tool gives a decoded weight."""
    return PRECISION[provenance.get("verify", {}).get("best", {}).get("peer_value_precision", "float32")]


def stored(ckpt: qhal_schemes.Checkpoint, key: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight as the tool shows it: experts that the file stacks are a parameter [E, in, out] of the model."""
    w = ckpt.stored(key.removesuffix(".weight")).to(dtype).float()
    return w if key.endswith(".weight") else w.transpose(1, 2)


def sha256(w: torch.Tensor) -> str:
    return hashlib.sha256(w.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_case_decodes_exactly(case: str) -> None:
    folder = golden_cases.path(case)
    provenance = json.loads((folder / "provenance.json").read_text())
    dtype = precision(provenance)
    ckpt = qhal_schemes.open_checkpoint(folder / "checkpoint")
    modules = ckpt.modules(quantized=True)
    assert modules
    compared = set()

    def near(key: str) -> float | None:
        return NEAR.get(str(ckpt.format(key.removesuffix(".weight")).weight))

    with safe_open(folder / "expected.safetensors", "pt") as expected:
        for key in expected.keys():  # noqa: SIM118 - not a dict
            if key.endswith(".weight") or key in modules:
                w, right, rtol = stored(ckpt, key, dtype), expected.get_tensor(key), near(key)
                assert torch.equal(w, right) if rtol is None else torch.allclose(w, right, rtol=rtol, atol=0), key
                compared.add(key.removesuffix(".weight"))
    for key, digest in provenance.get("weight_sha256", {}).items():
        w = stored(ckpt, key, dtype)
        assert near(key) is not None or digest in (sha256(w), sha256(w + 0.0)), key
        compared.add(key.removesuffix(".weight"))
    assert set(modules) <= compared, "every quantized module was compared"


def tools(f: Format, case: str) -> Format:
    """The format with the rule that the tool's own code follows; NVFP4 inputs are fp32 everywhere."""
    arith = "bf16" if family(case) in BF16_RULE and f.element != "e2m1" else "fp32"
    return replace(f, rule=replace(f.rule, arith=arith))


def turned(spec: LinearSpec, x: torch.Tensor) -> torch.Tensor:
    """What the product reads before it is quantized."""
    return (x.double() @ rotations.matrix(spec.rotate_in, x.shape[-1])).float() if spec.rotate_in else x


@pytest.mark.parametrize("case", having(".input_qdq"))
def test_inputs_are_quantized_as_by_the_tool(case: str) -> None:
    """With the tool's arithmetic every element is the tool's own, as the bf16 number that the product reads."""
    ckpt, expected = opened(case)
    for module in (key.removesuffix(".input_qdq") for key in expected if key.endswith(".input_qdq")):
        spec, want = ckpt.spec(module), expected[f"{module}.input_qdq"]
        got = turned(spec, expected[f"{module}.input"])
        if spec.input is not None:
            fmt = tools(spec.input.format, case)
            got = encode(got, fmt, scale=spec.input.scale, zero=spec.input.zero).dequantize()
        assert torch.equal(got.bfloat16(), want.bfloat16()), module
        if family(case) not in BF16_RULE:  # code * (amax / 448) here, code / (448 / amax) there: four roundings
            assert bool(((got - want).abs() <= want.abs() * 4 * 2**-24).all()), module


def result_dtype(y: torch.Tensor) -> torch.dtype:
    """The narrowest dtype that holds a tool's result: what its last step rounded to."""
    return next(d for d in (torch.bfloat16, torch.float16, torch.float32) if torch.equal(y.to(d).float(), y))


def product(
    spec: LinearSpec, expected: dict[str, torch.Tensor], case: str, operand: Operand | None, result: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 y without a rounding but that of its operands, and the sum of the terms' magnitudes."""
    x, given = expected[f"{spec.name}.input"], expected.get(f"{spec.name}.input_qdq")
    before = turned(spec, x)
    if given is None and operand is not None and family(case) in QUANTIZES_INPUT:
        q = encode(before, operand.format, scale=operand.scale, zero=operand.zero, clip=operand.clip)
        given = q.dequantize()
    if given is None and (spec.rotate_in or spec.rotate_out or spec.low_rank):
        x, w = x.double(), spec.effective().double()
        return x @ w.T, x.abs() @ w.abs().T
    q = (before if given is None else given).double()
    w = spec.stored().to(DECODES_TO.get(family(case), result)).double()
    size = q.abs()
    if spec.rotate_in:  # the rotation's own sums, before they cancel
        size = torch.maximum(size, x.abs().double() @ rotations.matrix(spec.rotate_in, x.shape[-1]).abs())
    y, size = q @ w.T, size @ w.abs().T
    if spec.low_rank is not None:
        down, up = (part.double() for part in spec.low_rank)
        y, size = y + before.double() @ down.T @ up.T, size + before.abs().double() @ down.abs().T @ up.abs().T
    return y, size


@pytest.mark.parametrize("case", [c for c in having("_proj.output") if c not in DECIDED_BY_THE_BATCH])
def test_outputs_follow_from_weight_input_and_bias(case: str) -> None:
    """|error| <= (K + 8) u S for fp32 products and sums in any order (S: the sum of magnitudes), then one rounding.

    The tools decode weights to the result's type first, and a bias is a second rounding.
    """
    ckpt, expected = opened(case)
    for module in (key.removesuffix(".output") for key in expected if key.endswith("_proj.output")):
        spec = ckpt.spec(module)
        for name in [name for name in BESIDE if f"{module}.{name}" in expected] or ["output"]:
            decoding = BESIDE.get(name, False)
            decoding = spec.decode_input is not None if decoding is None else decoding
            want = expected[f"{module}.{name}"]
            result = result_dtype(want)
            y, size = product(spec, expected, case, spec.decode_input if decoding else spec.input, result)
            bound, half_ulp = size * (spec.weight.shape[-1] + 8) * 2.0**-24, torch.finfo(result).eps / 2
            if family(case) in ROUNDS_TERMS:
                bound = bound + 2 * half_ulp * size
            if spec.bias is not None:
                bound = bound + half_ulp * (1 + half_ulp) * y.abs()
                y = y + spec.bias.double()
            assert bool(((y - want).abs() <= bound + half_ulp * (y.abs() + bound)).all()), (module, name)


def quantized_rows(x: torch.Tensor, operand: Operand, case: str) -> torch.Tensor:
    """[batch, heads, tokens, features] as a cache quantizes it, token by token."""
    rows, fmt = x.transpose(1, 2), tools(operand.format, case)
    flat = rows.flatten(2) if fmt.block is not None and fmt.block.kind == "col" else rows
    found = encode(flat, fmt, scale=operand.scale, zero=operand.zero).dequantize()
    return found.reshape(rows.shape).transpose(1, 2)


@pytest.mark.parametrize("case", having(*(f".{name}.input" for name in CACHED)))
def test_caches_are_quantized_as_by_the_tool(case: str) -> None:
    ckpt, expected = opened(case)
    compared = 0
    for layer in range(ckpt.config["num_hidden_layers"]):
        spec, attention = ckpt.kv_format(layer), f"model.layers.{layer}.self_attn"
        for name, side in CACHED.items():
            if f"{attention}.{name}.input" in expected:
                operand = getattr(spec, side)
                assert isinstance(operand, Operand)
                got = quantized_rows(expected[f"{attention}.{name}.input"], operand, case)
                got = got.bfloat16().float() if family(case) in BF16_RULE else got
                assert torch.equal(got, expected[f"{attention}.{name}.output"]), (layer, name)
                compared += 1
    assert compared


def reached(path: Path) -> tuple[str, set[Form]]:
    """The quant_method of a case and the forms it compares: of modules all, of caches those with fixtures."""
    ckpt, names = qhal_schemes.open_checkpoint(path / "checkpoint"), read_keys(path / "expected.safetensors")
    forms = {ckpt.form(m) for m in ckpt.modules(quantized=True)}
    for layer, f in ckpt.kv_formats().items():
        sides = {side for n, side in CACHED.items() if f"{ckpt.kv_layers[layer]}.{n}.input" in names}
        forms |= {cache_form(f)} if sides >= {side for side in "kvqp" if getattr(f, side) is not None} else set()
    return ckpt.method, forms


@pytest.mark.filterwarnings("ignore::qhal_schemes.CheckpointWarning")
def test_what_is_marked_compared_is_what_cases_reach() -> None:
    """schemes/qhal_schemes/compared: the full and the small set together reach every line and nothing beside them."""
    blocks = (kind for kind in TYPES.values() if kind.planes)  # random blocks: test_schemes_gguf
    found = {
        "gguf": {form(LinearFormat("", 1, kind.elements, Format.parse(kind.format)), kind.name) for kind in blocks}
    }
    for case in golden_cases.cases(*FAMILIES, *ELSEWHERE):
        method, forms = reached(golden_cases.path(case))
        assert method != "gguf" or forms <= found["gguf"]
        found.setdefault(method, set()).update(forms)
    for method in {*qhal_schemes.known_methods(), *found}:
        marked, forms = compared_forms(method), found.get(method, set())
        assert forms <= marked, f"compared/{method}.txt lacks {sorted(map(str, forms - marked))}"
        if golden_cases.FULL != golden_cases.SMALL or method in SHIPPED:
            assert marked <= forms, (
                f"compared/{method}.txt has {sorted(map(str, marked - forms))}, which no case reaches"
            )


def test_some_case_of_every_family_is_present() -> None:
    assert {family(case) for case in CASES} == set(FAMILIES)
