"""Collectives in the suite: its reference against the contract's simulation, its wire, ranks that misbehave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import comm_faulty
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qhal
from qhal import Codec
from qhal.collectives import simulate
from qhal.elements import element
from qhal.requests import NumericsClass
from qhal.wire import encode_part, wire_bytes
from qhal_conformance import comm_ranks
from qhal_conformance.cases import Case
from qhal_conformance.comm_check import build, request_of
from qhal_conformance.comm_reference import encoded, received, reduced, shares
from qhal_conformance.decode import numbers, to_numpy
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32
from qhal_conformance.mutants import MUTANTS, hunt
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind, Status
from qhal_conformance.problem import DTYPES
from qhal_conformance.runner import run_case
from qhal_conformance.tolerance import compare
from qhal_conformance.wrapping import Wrapped

CASES = [c for c in catalogue(0) if c.profile == "comm"]
ALL = [c for c in catalogue(1) if c.profile == "comm"]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    """Rank processes find the faults of this folder, and are ended with the module."""
    with pytest.MonkeyPatch.context() as patch:
        comm_ranks.end()
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield
        comm_ranks.end()


def _simulated(case: Case) -> list[torch.Tensor]:
    p, r = build(case), request_of(case)
    xs = [torch.from_numpy(x).to(DTYPES[case.out]) for x in p.xs]
    found = simulate(xs, r.collective, r.codec, p.splits)
    assert all(isinstance(y, torch.Tensor) for y in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_the_reference_is_the_contracts_to_the_bit(case: Case) -> None:
    for rank, y in enumerate(_simulated(case)):
        e = build(case).expected(rank, case.out)
        assert np.array_equal(e.value, numbers(y).reshape(e.value.shape)), rank
        assert compare(e.value.astype(np.float64), e.ref, e.bound, case.out).kind is None


@settings(max_examples=60, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(0, 9),
    collective=st.sampled_from(["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]),
    subject=st.sampled_from([c.subject for c in CASES]),
    seed=st.integers(0, 1000),
)
def test_worlds_up_to_eight(world: int, rows: int, collective: str, subject: str, seed: int) -> None:
    """What processes would be too many for: eight ranks, the contract's simulation against the suite's."""
    shape = (("w", world), ("t", rows), ("k", 96))
    case = Case("comm_quant", subject, shape, "bf16", "normal", seed, options=(collective,), profile="comm")
    for rank, y in enumerate(_simulated(case)):
        assert np.array_equal(build(case).expected(rank, case.out).value, numbers(y))


@pytest.mark.parametrize("case", [c for c in CASES if c.options[0] in ("all_reduce", "reduce_scatter")], ids=str)
def test_the_bound_from_both_sides(case: Case) -> None:
    for rank in range(case.size("w")):
        e = build(case).expected(rank, case.out)
        if e.ref.size:
            for share, wrong in ((0.99, None), (1.01, FailKind.NUMERIC)):
                assert compare(e.ref + share * e.bound, e.ref, e.bound, case.out).kind == wrong


def test_sums_in_another_order_are_within_the_bound() -> None:
    """Honest kernels: four ranks in reverse order and in float64, quantized again; exact sums to the bit."""
    ranked = [c for c in ALL if c.size("w") == 4 and c.options[0] in ("all_reduce", "reduce_scatter")]
    for case in [c.reseeded(seed) for c in ranked if not c.has("acc=fp16") for seed in range(3)]:
        p, codec = build(case), request_of(case).codec
        owners = range(4) if p.request.collective == "all_reduce" else (1,)
        for owner in owners:
            parts = [received(x, codec) for x in p.parts(owner)]
            back = p.request.collective == "all_reduce"
            e = reduced(p.parts(owner), owner, codec, case.out, back=back)
            backwards = parts[3] + parts[2] + parts[1] + parts[0]
            wide = np.sum([x.astype(np.float64) for x in parts], axis=0).astype(np.float32)
            for total in (backwards, wide):
                value = round_wide(case.out, received(total, codec) if back else total)
                found = compare(value.astype(np.float64), e.ref, e.bound, case.out)
                assert found.kind is None, (case.id, found.detail)
                assert case.data != "integers" or np.array_equal(value, e.value)


def _wire(x: F32, codec: Codec) -> bytes:
    """A part's bytes a second time: every plane a little-endian stream of bits."""
    q, where = encoded(x, codec)
    found = b""
    for name, plane in q.planes().items():
        level = codec.format
        for part in name.split("."):
            level = level if part == "codes" else getattr(level, part)
        raw = to_numpy(plane[:, torch.from_numpy(where)] if name == "codes" else plane)
        bits = {"fp32": 32, "fp16": 16, "bf16": 16}.get(level.element) or element(level.element).bits
        widths, shift = (codec.planes if name == "codes" and codec.planes else (bits,)), 0
        values = raw.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[raw.dtype.itemsize]).astype(np.uint64)
        for width in widths:
            stream = (values[:, None] >> np.arange(shift, shift + width, dtype=np.uint64)) & np.uint64(1)
            found += np.packbits(stream.reshape(-1).astype(np.uint8), bitorder="little").tobytes()
            shift += width
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_wire_is_the_contracts_byte_for_byte(case: Case) -> None:
    codec = request_of(case).codec
    for x in build(case).xs:
        ours = wire_bytes(encode_part(torch.from_numpy(x), codec), codec).numpy().tobytes()
        assert ours == _wire(x, codec)


def test_every_collective_codec_option_and_world_is_asked() -> None:
    assert {c.options[0] for c in CASES} == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all"}
    assert {o for c in CASES for o in c.options[1:]} >= {"own", "once", "codes", "async", "uneven", "parity", "deep"}
    assert {c.size("w") for c in CASES} == {1, 2}
    assert {c.size("w") for c in ALL} == {1, 2, 4}
    assert any(c.size("t") % 2 for c in CASES) and any(c.size("t") == 0 for c in CASES)
    assert shares(5, 2) == [3, 2] and shares(1, 2) == [1, 0] and shares(0, 2) == [0, 0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (comm_faulty.Dies, "rank 1 of 2 ended with code 17"),
        (comm_faulty.Hangs, "rank 0 of 2 did not answer within 2 s"),
        (comm_faulty.Raises, "rank 0 of 2: RuntimeError: no such kernel"),
    ],
)
def test_ranks_that_misbehave_end_the_case_not_the_run(
    kind: type[Wrapped], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm_ranks, "ANSWER_S", 2.0 if kind is comm_faulty.Hangs else 60.0)
    case = next(c for c in CASES if c.size("w") == 2)
    found = run_case(case, kind(qhal.select("cpu_reference"))).outcome
    assert found.status == Status.ERROR and words in found.reason


def test_what_a_rank_prints_is_no_answer() -> None:
    assert run_case(CASES[0], comm_faulty.Prints(qhal.select("cpu_reference"))).outcome.status == Status.PASS


def test_a_wrapper_that_no_rank_can_find_is_named() -> None:
    class Local(comm_faulty.Prints):
        """Lives in a function."""

    found = run_case(CASES[0], Local(qhal.select("cpu_reference"))).outcome
    assert found.status == Status.ERROR and "cannot make the backend" in found.reason


def test_a_backend_without_collectives_is_unsupported_not_an_error() -> None:
    found = run_case(CASES[0], comm_faulty.Refuses(qhal.select("cpu_reference"))).outcome
    assert found.status == Status.UNSUPPORTED, found


def test_moved_parts_are_exact_and_sums_are_fp32() -> None:
    ops = qhal.select("cpu_reference")
    for case in CASES:
        moved = case.options[0] in ("all_gather", "all_to_all")
        assert (ops.supports(request_of(case)).numerics == NumericsClass.EXACT) == moved


def test_every_planted_fault_is_killed() -> None:
    found = hunt(qhal.select("cpu_reference"), [m for m in MUTANTS if m.group == "comm"], 0)
    assert [m["name"] for m in found["mutants"] if not m["killed"]] == [] and found["total"] >= 25


def test_more_ranks_than_devices_are_skipped_and_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm_ranks, "_devices", lambda kind: 1)
    case = next(c for c in CASES if c.size("w") == 2)
    comm_ranks.end()
    comm_ranks.expect([case], "cpu")
    assert not comm_ranks._running
    outcome = run_case(case, qhal.select("cpu_reference")).outcome
    assert outcome.status is Status.SKIP and outcome.reason == "2 ranks need 2 devices; this machine has 1"


def test_a_rank_that_ends_is_noticed_while_another_is_waited_for() -> None:
    ranks = comm_ranks.Ranks(2, "cpu")
    try:
        ranks._processes[1].kill()
        with pytest.raises(comm_ranks.Lost, match="rank 1 of 2 ended"):
            ranks.ask(2, {})
    finally:
        ranks.close()
