"""Golden checkpoints of AQLM, VPTQ and QuIP#: weights are the tool's to the bit, products within a computed bound."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qhal
from qhal import rotations
from qhal.codebooks import CodebookFormat, CodebookTensor
from qhal_schemes import Checkpoint, open_checkpoint

GOLDEN = Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden"))
FAMILIES = ("aqlm", "vptq", "quip")
CASES = [f"{family}/{path.name}" for family in FAMILIES for path in sorted((GOLDEN / family).glob("*"))]
STORED = [c for c in CASES if not c.startswith("quip/")]
"""Families whose `<module>.weight` is the stored weight; QuIP#'s is behind its transforms, the stored one is `Wr`."""
TRANSFORMED = [c for c in CASES if c.startswith("quip/")]
U = 2.0**-24  # half an ulp of float32


def opened(case: str) -> tuple[Checkpoint, dict[str, Tensor]]:
    return open_checkpoint(GOLDEN / case / "checkpoint"), load_file(GOLDEN / case / "expected.safetensors")


def modules(expected: dict[str, Tensor], end: str) -> list[str]:
    return [key.removesuffix(end) for key in expected if key.endswith(f"_proj{end}")]


def magnitudes(case_spec: qhal.LinearSpec) -> Tensor:
    """float64 [N, K]: what bounds every partial sum of the transformed weight, |R_out| |W| |R_in|."""
    w = case_spec.stored().double().abs()
    n, k = w.shape
    w = w @ rotations.matrix(case_spec.rotate_in, k).abs().T
    return rotations.matrix(case_spec.rotate_out, n).abs().T @ w


def test_every_family_has_a_case() -> None:
    assert {case.partition("/")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", STORED)
def test_weights_are_the_tools_own(case: str) -> None:
    ckpt, expected = opened(case)
    compared = set()
    for module in modules(expected, ".weight"):
        assert torch.equal(ckpt.stored(module), expected[f"{module}.weight"]), module
        compared.add(module)
    hashes = json.loads((GOLDEN / case / "provenance.json").read_text()).get("weight_sha256", {})
    for key, digest in hashes.items():
        raw = ckpt.stored(key.removesuffix(".weight")).numpy().astype("<f4").tobytes()
        assert hashlib.sha256(raw).hexdigest() == digest, key
        compared.add(key.removesuffix(".weight"))
    assert compared == set(ckpt.modules(quantized=True))


@pytest.mark.parametrize("case", CASES)
def test_the_account_is_complete(case: str) -> None:
    ckpt, _ = opened(case)
    total = ckpt.summary()["totals"]
    assert total["consumed"] + total["plain"] == total["tensors"] and total["extra"] == 0
    for module in ckpt.modules(quantized=True):
        spec = ckpt.spec(module)
        assert isinstance(spec.weight, CodebookTensor) and isinstance(ckpt.format(module).weight, CodebookFormat)
        assert spec.format == ckpt.format(module)


@pytest.mark.parametrize("case", TRANSFORMED)
def test_lattice_weights_and_their_transforms(case: str) -> None:
    """Wr to the bit; behind the transforms, float32 sums of N + K terms. The quantizer kept SV before float16."""
    ckpt, expected = opened(case)
    (module,) = ckpt.modules(quantized=True)
    spec = ckpt.spec(module)
    assert torch.equal(spec.stored(), expected[f"{module}.Wr"])
    w = spec.effective().double()
    bound = (sum(w.shape) + 8) * U * magnitudes(spec)
    assert bool(((w - expected[f"{module}.weight"]).abs() <= bound).all())
    rounded = bound + 2.0**-11 * w.abs()
    assert bool(((w - expected[f"{module}.weight_quantizer"]).abs() <= rounded).all())


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_tools_own(case: str) -> None:
    """The layer on the reference, in float32: |error| <= (K + N + 8) u S, S the sum of magnitudes of all terms."""
    ckpt, expected = opened(case)
    ops = qhal.select("cpu_reference")
    for module in modules(expected, ".output"):
        spec, x = ckpt.spec(module), expected[f"{module}.input"]
        layer = ckpt.load_linear(module, ops, dtype=torch.float32)
        size = x.double().abs() @ magnitudes(spec).T
        size = size if spec.bias is None else size + spec.bias.double().abs()
        error = (layer(x).double() - expected[f"{module}.output"]).abs()
        assert bool((error <= (sum(spec.weight.shape) + 8) * U * size).all()), module


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_parts_of_the_decoded_weight(case: str, dim: int) -> None:
    ckpt, _ = opened(case)
    for module in ckpt.modules(quantized=True)[:4]:
        whole, parts = ckpt.stored(module), []
        try:
            parts = [ckpt.linear_spec(module, shard=(dim, rank, 2)) for rank in (0, 1)]
        except qhal.ShardError as refused:
            assert any(why in str(refused) for why in ("permuted", "rotation", "inside a codebook vector"))
            continue
        assert torch.equal(torch.cat([part.stored() for part in parts], dim), whole)


def test_fused_projections_are_refused_with_the_reason() -> None:
    ckpt, _ = opened(STORED[0])
    names = [m for m in ckpt.modules() if m.endswith(("q_proj", "k_proj"))]
    with pytest.raises(qhal.ShardError, match=r"codebook weights cannot be fused|some weights are quantized"):
        ckpt.load_linear(names, qhal.select("cpu_reference"))
