"""Engines build models with a default device (meta, an accelerator): answers and tables must not depend on it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch, qhal
from qhal.elements import decode, dynamic_map, values
from qhal.lattices import load as lattice
from qhal.hadamard_tables import load
from qhal.rotations import sylvester
ops = qhal.select("cpu_reference")
names = ["e2m1.g32*e8m0", "nf4_dq", "nf4.flat64*fp32", "e4m3fn.tensor*bf16", "int8.row*fp32", "int4.g32*bf16"]
requests = [qhal.QuantizeRequest(x=torch.bfloat16, format=qhal.Format.parse(n)) for n in names]
requests += [qhal.KVRequest(kind="mha", k=f, v=f, heads=1, k_dim=64, v_dim=64, page=16)
             for f in [qhal.Format.parse("e4m3fn.tensor*bf16"), qhal.Format.parse("int8.row*fp32")]]
with torch.device("meta"):
    answers = [ops.supports(r) for r in requests]
    tables = [values("e2m1"), values("nf4"), sylvester(8), load("quarot-12"), dynamic_map(), lattice("e8p12")]
assert all(answers), [a.reason for a in answers]
assert all(t.device.type == "cpu" for t in tables), tables
assert decode("e2m1", torch.tensor([7], dtype=torch.uint8)).item() == 6.0
"""


CALLS = """
import sys, torch, qhal
import torch.distributed as dist
from qhal import Codec, Format, LinearSpec
from qhal.collectives import simulate
from qhal.rotations import Diagonal, Hadamard, Kronecker, Permutation, matrix
from qhal.wire import encode_part, read_wire, wire_bytes
ops = qhal.select("cpu_reference")
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
x = torch.arange(6.0 * 192).reshape(6, 192).bfloat16()
factor, index = torch.ones(4, 4) - 2 * torch.eye(4), torch.arange(191, -1, -1)
chain = [Diagonal(torch.ones(192)), Permutation(index), Hadamard(64), Hadamard(192, 12, "quarot-12")]
chain += [Kronecker(factor, None), Kronecker(None, factor), Kronecker(None, None)]
codecs = [Codec(Format.parse("int5.g32*fp16"), order="parity"), Codec(Format.parse("e4m3fn.g128*fp32"))]
specs = [LinearSpec(weight=torch.ones(2, 4), bias=b, name=n) for n, b in (("q", torch.ones(2)), ("k", None))]

def answers():
    found = [r.matrix(192) for r in chain] + [matrix(chain, 192), LinearSpec.concat(specs).bias]
    for codec in codecs:
        q = encode_part(x, codec)
        found += [wire_bytes(q, codec), read_wire(wire_bytes(q, codec), codec, *x.shape).dequantize()]
        found += simulate([x, x + 1], "all_reduce", codec)
        found.append(ops.comm_quant(x, "all_gather", codec, dist.group.WORLD))
    return found

usual = answers()
with torch.device("meta"):
    other = answers()
assert all(a.device == b.device and torch.equal(a, b) for a, b in zip(usual, other, strict=True))
dist.destroy_process_group()
"""


def test_rotations_layers_and_collectives_follow_their_tensors() -> None:
    """Not the default device: the same bits, on the device of what was given."""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_question_may_come_on_the_meta_device() -> None:
    """In a fresh process, so that no cache was filled before."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
