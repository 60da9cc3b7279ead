"""The catalogue: readable unique ids, kept lists, pairs that all occur, inputs that never change by accident."""

from __future__ import annotations

import itertools

import pytest

from qhal.errors import FormatError
from qhal_conformance import mustpass
from qhal_conformance.cases import PROFILES, find
from qhal_conformance.datasets import DATASETS
from qhal_conformance.describe import describe
from qhal_conformance.gemm_cases import EVERYWHERE, PAIRS, far
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
    everywhere = [data for data in tiled if data in EVERYWHERE]
    assert {(d, m) for d in everywhere for m in (16, 17, 33, 1, 64, 31)} <= shapes
    assert {d for d, m in shapes if m == 1} >= set(everywhere)
    biased = [data for data in DATASETS if data not in ("limits", "special", "positive")]
    assert {(case.data, case.has("bias")) for case in gemm} >= set(itertools.product(biased, (True, False)))
    firsts = {pair.profile: pair for pair in reversed(PAIRS)}
    for pair in PAIRS:
        mine = [case for case in gemm if case.subject == pair.subject and set(pair.options) <= set(case.options)]
        assert {case.data for case in mine} >= set(EVERYWHERE)
        if pair == firsts[pair.profile]:
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
    "gemm/bf16/m16_n128_k256/bf16/normal+exact/0": "ecb6957acebccede",
    "gemm/bf16/m17_n129_k160/bf16/codes+bias/0": "d14d4c689c8c760d",
    "quantize/int8.row*fp32/m515_k96/fp32/normal/0": "0f72e0f5c0876b04",
    "quantize/int8.row*fp32/m64_k512/bf16/grid+offset/0": "9da3614111193a1c",
    "hadamard/sylvester2/m2_n2/bf16/impulse/0": "665f94cfcc1f67b1",
    "hadamard/sylvester2/m5_n2/fp32/normal+strided/0": "a90bfaff0887dc6d",
    "quant_kv/bf16/t19_g2_d64_p16/bf16/scattered/0": "fc7877dc109cfb74",
    "quant_kv/bf16/t520_g8_d32_p64/bf16/positive+offset/0": "f12d8c4191597e44",
    "attention/bf16/l0_h4_g2_d64_p16/bf16/normal+lse/0": "7a3755d4110073be",
    "attention/bf16/l1_h6_g1_d64_p16/bf16/uniform+offset+window/0": "5cd340c0bcb5b716",
    "grouped_gemm/int4.g32*bf16/e5_n64_k256/bf16/normal+offsets+bias+uneven/0": "f417ccfc4da50f53",
    "grouped_gemm/int4.g32*bf16/e5_n96_k256/bf16/codes+offset+offsets+silu+one/0": "fa88a504ed98919c",
    "hadamard/quarot-12x4/m96_n96/bf16/impulse/0": "94c168fdb8fad91d",
    "quant_kv/mla:bf16/t19_r64_d16_p16/bf16/scattered/0": "a788ee655e4d2f62",
    "attention/mla:bf16/l0_h4_r64_d16_p16/bf16/normal+lse/0": "972072bc96758303",
    "vq_decode/aqlm-1x16/n512_k1024/fp16/identity/0": "b5591011f479730d",
    "vq_gemm/aqlm-1x16/m17_n48_k64/fp16/onehot/0": "9ff9f28f134e0005",
    "comm_quant/int8.g128*fp16/w2_t5_k130/bf16/integers+all_reduce/0": "114c92364d8dbb47",
    "comm_quant/int8.g128*fp16/w2_t3_k130/fp16/ranks+all_gather+uneven/0": "740e9942e541481f",
    "contract/supports-is-total/m16_n64_k256/bf16/normal/0": "84c1c1787bf1bfc6",
}
