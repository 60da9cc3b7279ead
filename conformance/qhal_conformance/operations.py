"""The operations of the suite by name: which cases each has, how one is run, what `supports` is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from qhal.interface import QuantOps
from qhal.requests import Request
from qhal_conformance import (
    attention_cases,
    attention_check,
    comm_cases,
    comm_check,
    contract_check,
    datasets,
    gemm_cases,
    gemm_check,
    grouped_cases,
    grouped_check,
    hadamard_check,
    kv_check,
    mla_cases,
    quantize_check,
    quantize_data,
    vq_cases,
    vq_check,
    vq_kinds,
)
from qhal_conformance.cases import Case
from qhal_conformance.outcome import Outcome


@dataclass(frozen=True)
class Operation:
    """One row of the suite.

    cases    every case of a level; level 1 contains level 0
    run      ask the backend and compare; raises problem.Fault for a contract that does not hold
    request  what `supports` is asked for this case, None where no single request stands for it
    sha      sha256 of the case's inputs
    data     what each data set is for
    """

    name: str
    meaning: str
    cases: Callable[[int], list[Case]]
    run: Callable[[Case, QuantOps], Outcome]
    request: Callable[[Case], Request | None]
    sha: Callable[[Case], str]
    data: Mapping[str, str]


OPERATIONS: dict[str, Operation] = {
    o.name: o
    for o in (
        Operation(
            "gemm",
            "Q(x) @ W.T + bias against float64, with a bound per element",
            gemm_cases.cases,
            gemm_check.run,
            gemm_check.request_of,
            lambda case: gemm_check.build(case).inputs_sha,
            datasets.DATASETS,
        ),
        Operation(
            "quantize",
            "codes and scales, bit for bit",
            quantize_check.cases,
            quantize_check.run,
            quantize_check.request_of,
            lambda case: quantize_check.build(case).inputs_sha,
            quantize_data.QUANTIZE_DATA,
        ),
        Operation(
            "hadamard",
            "rotations alone and in chains: exact probes, bound, and back",
            hadamard_check.cases,
            hadamard_check.run,
            hadamard_check.request_of,
            lambda case: hadamard_check.build(case).inputs_sha,
            hadamard_check.HADAMARD_DATA,
        ),
        Operation(
            "quant_kv",
            "codes into a paged cache, bit for bit, and nothing else",
            lambda level: kv_check.cases(level) + mla_cases.kv_cases(level),
            kv_check.run,
            kv_check.request_of,
            lambda case: kv_check.build(case).inputs_sha,
            kv_check.KV_DATA,
        ),
        Operation(
            "attention",
            "paged attention against float64, with a bound per element",
            lambda level: attention_cases.cases(level) + mla_cases.attention_cases(level),
            attention_check.run,
            attention_check.request_of,
            lambda case: attention_check.build(case).inputs_sha,
            attention_cases.ATTENTION_DATA,
        ),
        Operation(
            "grouped_gemm",
            "products by expert in three forms, judged row by row",
            grouped_cases.cases,
            grouped_check.run,
            grouped_cases.request_of,
            lambda case: grouped_check.build(case).inputs_sha,
            grouped_cases.GROUPED_DATA,
        ),
        Operation(
            "vq_decode",
            "codebook weights to dense rows: every index, exactly where the result's type holds it",
            vq_cases.decode_cases,
            vq_check.run_decode,
            vq_check.decode_request,
            lambda case: vq_check.build(case).inputs_sha,
            vq_kinds.VQ_DATA,
        ),
        Operation(
            "vq_gemm",
            "gemm with codebook weights against float64, with a bound per element",
            vq_cases.gemm_cases,
            vq_check.run_gemm,
            vq_check.gemm_request,
            lambda case: vq_check.build(case).inputs_sha,
            vq_kinds.VQ_DATA,
        ),
        Operation(
            "comm_quant",
            "quantized collectives over ranks in processes of their own: bits, bounds, agreement",
            comm_cases.cases,
            comm_check.run,
            comm_check.request_of,
            lambda case: comm_check.build(case).inputs_sha,
            comm_cases.COMM_DATA,
        ),
        Operation(
            "contract",
            "what every backend keeps beside its numbers",
            contract_check.cases,
            contract_check.run,
            contract_check.request_of,
            contract_check.sha,
            {},
        ),
    )
}


@lru_cache(maxsize=4)
def catalogue(level: int) -> tuple[Case, ...]:
    """Every case of a level, in the order in which they run."""
    return tuple(case for o in OPERATIONS.values() for case in o.cases(level))
