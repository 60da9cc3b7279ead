"""The catalogue: readable unique ids, kept lists, pairs that all occur, inputs that never change by accident."""

from __future__ import annotations

import itertools

import pytest

from qhal.errors import FormatError
from qhal_conformance import mustpass
from qhal_conformance.cases import PROFILES, find
from qhal_conformance.datasets import DATASETS
from qhal_conformance.describe import describe
from qhal_conformance.gemm_cases import PAIRS, far
from qhal_conformance.guards import STORAGES
from qhal_conformance.operations import OPERATIONS, catalogue


@pytest.mark.parametrize("level", [0, 1])
def test_ids_are_unique_and_the_kept_list_is_current(level: int) -> None:
    ids = [case.id for case in catalogue(level)]
    assert len(ids) == len(set(ids))
    assert mustpass.kept(level).splitlines() == mustpass.lines(level), "run python -m qhal_conformance.mustpass"


def test_level_one_contains_level_zero() -> None:
    assert {case.id for case in catalogue(0)} <= {case.id for case in catalogue(1)}


def test_level_zero_is_small() -> None:
    assert len(catalogue(0)) <= 625
    for case in catalogue(0):
        work = 1
        for letter in "mnk":
            work *= dict(case.shape).get(letter, 1)
        assert work <= 2**24, case.id


def test_every_profile_has_required_cases() -> None:
    required = mustpass.required(0)
    assert set(required) == set(PROFILES)
    assert all(case.profile in PROFILES for case in catalogue(1))


def test_every_pair_of_choices_occurs() -> None:
    """Pairwise, not the full product: no fault needs three coincidences to be seen."""
    gemm = [case for case in catalogue(0) if case.operation == "gemm"]
    seen_storage = {(case.data, case.storage) for case in gemm}
    assert seen_storage == set(itertools.product(DATASETS, STORAGES))
    shapes = {(case.data, case.size("m")) for case in gemm}
    tiled = [data for data in DATASETS if data not in far(PAIRS[0])]  # the others go past a kernel's loops
    assert {(d, m) for d in tiled for m in (16, 17, 33, 1, 64, 31)} <= shapes
    biased = [data for data in DATASETS if data not in ("limits", "special", "positive")]
    assert {(case.data, case.has("bias")) for case in gemm} >= set(itertools.product(biased, (True, False)))
    for pair in PAIRS:
        mine = [case for case in gemm if case.subject == pair.subject and set(pair.options) <= set(case.options)]
        assert {case.data for case in mine} == set(DATASETS)
        assert {case.size("m") for case in mine} >= {1, 256, 515}
    assert {case.profile for case in gemm if case.size("m") == 0} == {pair.profile for pair in PAIRS}


def test_inputs_are_the_ones_that_were_published() -> None:
    """These hashes change only with the suite's major version."""
    by_id = {case.id: case for case in catalogue(0)}
    for name, sha in PUBLISHED.items():
        case = by_id[name]
        assert OPERATIONS[case.operation].sha(case).startswith(sha), name


def test_find_takes_other_seeds_and_names_what_is_near() -> None:
    case = catalogue(0)[3]
    assert find(catalogue(0), case.id) is case
    assert find(catalogue(0), case.id[:-1] + "17").seed == 17
    with pytest.raises(FormatError, match="near it"):
        find(catalogue(0), case.id.replace("/m", "/m9"))


def test_every_case_can_be_described() -> None:
    for operation in OPERATIONS:
        case = next(c for c in catalogue(0) if c.operation == operation)
        found = describe(case)
        assert found["case"] == case.id and len(found["inputs"]) == len("sha256 ") + 64


PUBLISHED = {
    "gemm/bf16/m16_n128_k256/bf16/normal+exact/0": "a8df28d5cb4223e2",
    "gemm/bf16/m17_n129_k160/bf16/codes+bias/0": "2c573330c0278bca",
    "quantize/int8.row*fp32/m515_k96/fp32/normal/0": "4ee067f06abc0338",
    "quantize/int8.row*fp32/m64_k512/bf16/grid+offset/0": "c7aa355f18971ebe",
    "hadamard/sylvester2/m2_n2/bf16/impulse/0": "e8133e27f60b10ab",
    "hadamard/sylvester2/m5_n2/fp32/normal+strided/0": "2f275c7b1a73fbf1",
    "quant_kv/bf16/t19_g2_d64_p16/bf16/scattered/0": "8f70a7973ca1bc0c",
    "quant_kv/bf16/t520_g8_d32_p64/bf16/positive+offset/0": "f4206c7ef1844b1b",
    "attention/bf16/l0_h4_g2_d64_p16/bf16/normal+lse/0": "1325c40193250ee0",
    "attention/bf16/l1_h6_g1_d64_p16/bf16/uniform+offset+window/0": "569910e2d5446dcd",
    "grouped_gemm/int4.g32*bf16/e5_n64_k256/bf16/normal+offsets+bias+uneven/0": "bfce07d351a57667",
    "grouped_gemm/int4.g32*bf16/e5_n96_k256/bf16/codes+offset+offsets+silu+one/0": "8e5cb18d424337c5",
    "hadamard/quarot-12x4/m96_n96/bf16/impulse/0": "168f2ee89e4fa366",
    "quant_kv/mla:bf16/t19_r64_d16_p16/bf16/scattered/0": "b6c23f0a47fd800e",
    "attention/mla:bf16/l0_h4_r64_d16_p16/bf16/normal+lse/0": "11971cdb4ff9957d",
    "vq_decode/aqlm-1x16/n512_k1024/fp16/identity/0": "04019d109477a91a",
    "vq_gemm/aqlm-1x16/m17_n48_k64/fp16/onehot/0": "c1d641994808af9c",
    "comm_quant/int8.g128*fp16/w2_t5_k130/bf16/integers+all_reduce/0": "4e1fc2fd558ab862",
    "comm_quant/int8.g128*fp16/w2_t3_k130/fp16/ranks+all_gather+uneven/0": "6814b2f0496380b2",
    "contract/supports-is-total/m16_n64_k256/bf16/normal/0": "1302703bf584cd37",
}
