"""Ranks: what supports claims, errors that every rank raises alike, and gloo against the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Codec, CommError, CommRequest, Format, FormatError, NumericsClass, UnsupportedError
from qhal.collectives import simulate
from qhal.elements import ELEMENTS
from qhal.requests import minimum_class

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


def codec(name: str, **options: object) -> Codec:
    return Codec(Format.parse(name), **options)  # type: ignore[arg-type]


codecs = st.builds(
    Codec,
    format=st.sampled_from(["int8.g32*fp16", "int6.row*fp16", "mxfp4", "nf4_dq", "bf16", "int8.col*fp32",
                            "int4.row*fp32@special=error", "e4m3fn.row*bf16%2:4", "lut4", "nvfp4", "int8.head*fp32",
                            "q2_k", "int8.g4*(int8.row*fp32@special=error)"]).map(Format.parse),
    order=st.sampled_from(["sequential", "sequential", "parity", "odd"]), spikes=st.sampled_from([0, 0, 0, 2]),
    planes=st.sampled_from([(), (), (4, 2), (8,), (4, 4, -2), (16,)]),
    accumulate=st.sampled_from(["fp32", "fp32", "fp16", "fp64"]), quantize_own=st.booleans(), requantize=st.booleans(),
    version=st.sampled_from([1, 1, 1, 2]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    c=codecs, collective=st.sampled_from([*COLLECTIVES, "broadcast"]), world=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]), decode=st.booleans(),
)  # fmt: skip
def test_supports_is_honest_both_ways(ops, c, collective, world, dtype, decode):
    r = CommRequest(collective=collective, codec=c, world=world, x=dtype, numel=128, decode=decode)
    answer = ops.supports(r)
    xs = [torch.ones(4, 32, dtype=dtype)] * world
    if answer:
        assert answer.level == "full" and answer.numerics <= minimum_class(r) and str(c.format) in answer.executes
        assert len(simulate(xs, collective, c, decode=decode)) == world
    else:
        assert answer.level == "unsupported" and answer.reason and "cannot be read" not in answer.reason
        with pytest.raises(UnsupportedError) as refused:
            simulate(xs, collective, c, decode=decode)
        assert refused.value.support == answer


def test_every_integer_float_and_mx_element_travels(ops):
    for name, e in ELEMENTS.items():
        if e.kind in ("int", "float", "mini") and name not in ("int1", "fp32", "fp16", "bf16"):
            for scale in ("row*fp32", "g32*fp16", "g32*e8m0"):
                c = codec(f"{name}.{scale}")
                r = CommRequest(collective="all_reduce", codec=c, world=8, x=torch.bfloat16, numel=4096)
                assert ops.supports(r).level == "full" and ops.supports(r).numerics == NumericsClass.FP32_ACC


def test_an_old_request_says_what_to_write(ops):
    r = CommRequest(collective="all_reduce", codec=Format.parse("int8_row"), world=2, x=torch.half, numel=8)
    assert "Codec(format)" in ops.supports(r).reason


@pytest.mark.parametrize(
    ("xs", "collective", "splits", "words"),
    [
        ([torch.ones(4, 32)] * 2, "all_reduce", [[2, 2]] * 2, "no meaning"),
        ([torch.ones(4, 32)] * 2, "reduce_scatter", [[2, 1]] * 2, "add up to the rows"),
        ([torch.ones(4, 32)] * 2, "reduce_scatter", [[5, -1]] * 2, "at least 0"),
        ([torch.ones(4, 32)] * 2, "all_to_all", [[4]] * 2, "must be 2 counts"),
        ([torch.ones(4, 32)] * 2, "all_gather", [[1, 2]] * 2, "rows of every rank"),
        ([torch.ones(4, 32)] * 2, "all_to_all", [[2.0, 2.0]] * 2, "host integers"),
        ([torch.ones(4, 32)] * 2, "all_to_all", [[2, 2]], "1 entries for 2 ranks"),
        ([torch.ones(32)] * 2, "all_gather", None, r"must be \[T, K\]"),
        ([torch.ones(2, 2, 32)] * 2, "all_to_all", None, r"must be \[T, K\]"),
        ([torch.ones(())] * 2, "all_reduce", None, r"must be \[..., K\]"),
        ([[1.0]] * 2, "all_reduce", None, "x is a list"),
    ],
)
def test_wrong_arguments_are_one_clear_error(xs, collective, splits, words):
    with pytest.raises(FormatError, match=words):
        simulate(xs, collective, codec("int8.g32*fp16"), splits)


def test_ranks_that_disagree_are_told_who_wants_what():
    with pytest.raises(CommError) as error:
        simulate([torch.ones(4, 32), torch.ones(4, 33), torch.ones(4, 32)], "all_gather", codec("mxfp4"))
    assert "ranks 0, 2: version 1 all_gather fp32 [4, 32] as e2m1.g32*e8m0" in str(error.value)
    assert "rank 1: version 1 all_gather fp32 [4, 33]" in str(error.value)


def test_without_a_group_nothing_hangs(ops):
    with pytest.raises(CommError, match="init_process_group"):
        ops.comm_quant(torch.ones(2, 32), "all_reduce", codec("int8.row*fp32"), None)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gloo_equals_the_simulation_and_every_rank_gets_the_same_error(world, tmp_path):
    """Real processes; each compares its results with `simulate` to the bit (comm_worker.py)."""
    worker = Path(__file__).with_name("comm_worker.py")
    command = [sys.executable, str(worker)]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(world), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(err[-2000:] for _, err in ended)
    said = [[json.loads(line) for line in out.splitlines() if line.startswith("[")] for out, _ in ended]
    errors = [{name: text for name, text in lines if text} for lines in said]
    assert all(["done", ""] in lines for lines in said) and all(e == errors[0] for e in errors)
    assert len(errors[0]) == (0 if world == 1 else 11)
    assert all("disagree" in text and "rank 0" in text.replace("ranks", "rank") for text in errors[0].values())
    assert (["gone", ""] in said[-1]) == (world == 2)
