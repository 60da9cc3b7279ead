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


def test_the_first_question_may_come_on_the_meta_device() -> None:
    """In a fresh process, so that no cache was filled before."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
