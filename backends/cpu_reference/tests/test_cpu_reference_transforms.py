"""quantize and hadamard: the definition is called, arguments are checked, matrices are the ones of `qhal.rotations`."""

from __future__ import annotations

import math

import pytest
import torch

from qhal import (
    Dense,
    Diagonal,
    Format,
    FormatError,
    Hadamard,
    HadamardRequest,
    Kronecker,
    Operand,
    Permutation,
    UnsupportedError,
    rotations,
)
from qhal.encoding import encode

FORMATS = ["int8.row*fp32", "int4.g8*bf16", "e4m3fn.row*fp32", "e4m3fn.g8*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)",
           "uint4-uint4.g8*fp16@domain=minmax", "e4m3fn.tensor*fp32", "e4m3fn.4x8*fp32", "int8.col*fp32",
           "bf16"]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(5, 32), (1, 32), (0, 32), (2, 3, 32)])
def test_quantize_is_the_definition_and_changes_nothing(ops, name, shape):
    x = torch.randn(shape)
    before = x.clone()
    f = Format.parse(name)
    q = ops.quantize(x, f)
    assert q.equal(encode(x, f)) and torch.equal(x, before) and q.shape == shape
    out = ops.quantize(torch.randn(shape), f)
    assert ops.quantize(x, f, out=out) is out and out.equal(q)


def test_quantize_int8_by_hand(ops):
    x = torch.tensor([[1.0, -2.0, 0.5, 127.0], [0.0, 0.0, 0.0, 0.0], [2.5, -1.5, 0.5, 127.0]])
    q = ops.quantize(x, Format.parse("int8.row*fp32"))
    assert q.scale.tolist() == [[1.0], [1.0], [1.0]]
    assert q.codes.tolist() == [[1, -2, 0, 127], [0, 0, 0, 0], [2, -2, 0, 127]]  # ties go to even
    static = ops.quantize(x, Operand(Format.parse("int8.row*fp32"), scale=torch.tensor([0.5])))
    assert static.codes[0].tolist() == [2, -4, 1, 127] and static.scale.tolist() == [[0.5]] * 3


def test_quantize_errors(ops, make):
    f = Format.parse("int8.row*fp32")
    for bad in (torch.zeros(4), torch.zeros(2, 4, dtype=torch.int32), [1.0]):
        with pytest.raises((FormatError, UnsupportedError)):
            ops.quantize(bad, f)
    with pytest.raises(FormatError, match=r"out\.codes"):
        ops.quantize(torch.zeros(2, 4), f, out=ops.quantize(torch.zeros(3, 4), f))
    with pytest.raises(FormatError, match="out is a"):
        ops.quantize(torch.zeros(2, 4), f, out=ops.quantize(torch.zeros(2, 4), Format.parse("int4.row*fp32")))
    with pytest.raises(UnsupportedError, match="needs a table"):
        ops.quantize(torch.zeros(2, 4), Format.parse("lut4.row*fp32"))
    with pytest.raises(UnsupportedError, match="no scale"):
        ops.quantize(torch.zeros(2, 4), Operand(Format("e4m3fn"), scale=torch.ones(1)))


def chains() -> list[tuple[rotations.Rotation, ...]]:
    g = torch.Generator().manual_seed(1)

    def square(n: int) -> torch.Tensor:
        return torch.randn(n, n, generator=g)

    return [
        (Hadamard(32),), (Hadamard(8),), (Hadamard(1),), (Diagonal(torch.randn(32, generator=g)),),
        (Permutation(torch.randperm(32, generator=g)),), (Dense(square(4)),), (Dense(square(32)),),
        (Kronecker(square(4), square(8)),), (Kronecker(None, square(8)),), (Kronecker(square(8), None),),
        (Diagonal(torch.randn(32, generator=g)), Hadamard(16), Permutation(torch.randperm(32, generator=g)),
         Kronecker(square(2), square(16))), (),
    ]  # fmt: skip


@pytest.mark.parametrize("chain", chains(), ids=lambda c: "+".join(type(r).__name__ for r in c) or "empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard_is_the_matrix_of_the_chain(ops, chain, dtype):
    request = HadamardRequest(kinds=rotations.kinds(chain), n=32, x=dtype)
    p = ops.prepare(chain, request)
    x = torch.randn(7, 32).to(dtype)
    before = x.clone()
    want = x.double() @ rotations.matrix(chain, 32)
    for got in (ops.hadamard(x, chain), ops.hadamard(x, p), ops.hadamard(x.reshape(7, 1, 32), p).reshape(7, 32)):
        ulp = torch.finfo(dtype).eps * want.abs() + 1e-9
        assert got.dtype == dtype and ((got.double() - want).abs() <= 0.5001 * ulp + 1e-12).all()
    assert torch.equal(x, before) and ops.hadamard(x[:0], p).shape == (0, 32)
    out = torch.empty_like(x)
    assert ops.hadamard(x, p, out=out) is out and torch.equal(out, ops.hadamard(x, p))


def test_hadamard_impulses_and_involution_are_exact(ops):
    for n in (4, 16, 64, 256):  # orders 4^k: 1/sqrt(n) is a power of two, so integers stay exact
        y = ops.hadamard(torch.eye(n), (Hadamard(n),))
        assert torch.equal(y, rotations.sylvester(n).float() / math.sqrt(n))
        x = torch.randint(-64, 64, (3, n)).float()
        assert torch.equal(ops.hadamard(ops.hadamard(x, (Hadamard(n),)), (Hadamard(n),)), x)
    x = torch.randn(4, 128)
    assert torch.allclose(ops.hadamard(ops.hadamard(x, (Hadamard(128),)), (Hadamard(128),)), x, atol=1e-6)


def test_hadamard_of_a_table_order(ops, monkeypatch):
    t = torch.ones(12, 12)  # Paley construction over 11: q(i - j) is 1 for squares, -1 otherwise
    squares = {i * i % 11 for i in range(1, 11)}
    for i in range(1, 12):
        t[i, 0] = -1
        for j in range(1, 12):
            t[i, j] = 1 if i == j or (j - i) % 11 in squares else -1
    assert torch.equal(t @ t.T, 12 * torch.eye(12))
    monkeypatch.setitem(rotations.TABLES, "test12", lambda: t)
    x = torch.randn(3, 96)
    for transpose in (False, True):
        r = Hadamard(48, 12, "test12", transpose)
        want = x.double() @ r.matrix(96)
        assert torch.allclose(ops.hadamard(x, (r,)).double(), want, atol=1e-6)
        assert torch.allclose(ops.hadamard(ops.hadamard(x, (r,)), (r.inverse(),)), x, atol=1e-5)


def test_hadamard_quantizes_the_rounded_result(ops):
    x = torch.randn(6, 64).bfloat16()
    o = Operand(Format.parse("int8.row*fp32"))
    fused = ops.hadamard(x, (Hadamard(64),), quantize=o)
    assert fused.equal(ops.quantize(ops.hadamard(x, (Hadamard(64),)), o))


def test_rotation_refits_keep_addresses(ops):
    def chain(seed):
        g = torch.Generator().manual_seed(seed)
        return (Diagonal(torch.randn(8, generator=g)), Dense(torch.randn(4, 4, generator=g)))

    r = HadamardRequest(kinds=rotations.kinds(chain(0)), n=8, x=torch.float32)
    p = ops.prepare(chain(0), r)
    addresses = [t.data_ptr() for t in p.tensors().values()]
    ops.prepare(chain(1), r, into=p)
    assert [t.data_ptr() for t in p.tensors().values()] == addresses
    assert torch.equal(ops.hadamard(torch.eye(8), p), ops.hadamard(torch.eye(8), chain(1)))
    with pytest.raises(FormatError, match="the request says"):
        ops.prepare((Hadamard(8),), r)
    with pytest.raises(UnsupportedError, match="no canonical weight"):
        ops.restore(p)


def test_hadamard_errors(ops):
    for chain in ((Hadamard(64),), (Diagonal(torch.ones(7)),), (Hadamard(24, 12, "unknown"),), (Dense(torch.eye(5)),)):
        with pytest.raises(UnsupportedError):
            ops.hadamard(torch.zeros(2, 24), chain)
    with pytest.raises(FormatError, match="out is"):
        ops.hadamard(torch.zeros(2, 8), (Hadamard(8),), out=torch.zeros(2, 4))
    for index in ([0, 1, 9], [0, 1, 1], [0, 1, -1]):
        with pytest.raises(FormatError, match="must name each of them once"):
            ops.hadamard(torch.zeros(2, 3), (Permutation(torch.tensor(index)),))


def test_a_hadamard_table_registered_after_it_was_refused(ops, monkeypatch):
    """The answer used to be cached for ever."""
    chain = (Hadamard(48, 12, "later12"),)
    request = HadamardRequest(kinds=rotations.kinds(chain), n=48, x=torch.float32)
    assert "no Hadamard table 'later12'" in ops.supports(request).reason
    monkeypatch.setitem(rotations.TABLES, "later12", rotations.TABLES["quarot-12"])
    assert ops.supports(request)
    x = torch.randn(3, 48)
    assert torch.equal(ops.hadamard(x, chain), ops.hadamard(x, (Hadamard(48, 12, "quarot-12"),)))
