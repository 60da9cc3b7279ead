"""Layers inside torch.compile: one operator each, without a graph break, with the bits of the eager call."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from qhal import (
    Activation,
    AttentionRequest,
    ExpertsSpec,
    Format,
    FormatError,
    Hadamard,
    Indexed,
    KVCache,
    KVRequest,
    Limits,
    LinearSpec,
    Operand,
    PreparedLinear,
    select,
)
from qhal.compiling import PagedAttention
from qhal.encoding import encode
from qhal.layers import prepare_experts, prepare_linear

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def spec(n: int = 32, k: int = 64, seed: int = 0, **more: object) -> LinearSpec:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return LinearSpec(encode(w, Format.parse("int4.g32*bf16")), **more)  # type: ignore[arg-type]


def compiled(fn: object) -> object:
    return torch.compile(fn, backend="aot_eager", fullgraph=True)  # type: ignore[call-overload]


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64)])
def test_a_layer_is_one_operator(shape: tuple[int, ...]) -> None:
    layer = prepare_linear(spec(input=Operand(Format.parse("int8.row*fp32"))), select("cpu_reference"))
    x = torch.randn(shape, dtype=BF16)

    def model(x: Tensor) -> Tensor:
        return layer(x).relu() + 1

    assert torch.equal(compiled(model)(x), model(x))  # type: ignore[operator]


def test_a_rotated_layer_with_a_result_type_of_its_own() -> None:
    layer = prepare_linear(spec(rotate_in=(Hadamard(64),)), select("cpu_reference"), out=torch.float32)
    x = torch.randn(3, 64, dtype=BF16)
    found = compiled(lambda x: layer(x) * 2)(x)  # type: ignore[operator]
    assert found.dtype == torch.float32 and torch.equal(found, layer(x) * 2)


def test_experts() -> None:
    ops = select("cpu_reference")
    generator = torch.Generator().manual_seed(1)
    fmt = Format.parse("int4.g32*bf16")
    gate_up, down = (encode(torch.randn(2, *shape, generator=generator), fmt) for shape in ((64, 64), (64, 32)))
    whole = ExpertsSpec(LinearSpec(gate_up), LinearSpec(down), Activation("silu"))
    layer = prepare_experts(whole, ops, groups="indexed", top_k=2)
    ids, weights = torch.tensor([[0, 1], [1, -1], [0, 0]], dtype=torch.int32), torch.rand(3, 2)
    x = torch.randn(3, 64, dtype=BF16)

    def model(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return layer(x, Indexed(ids, weights)) + x

    assert torch.equal(compiled(model)(x, ids, weights), model(x, ids, weights))  # type: ignore[operator]


def test_a_cache_is_written_and_read() -> None:
    ops = select("cpu_reference")
    kv = KVRequest(kind="mha", k=Format.parse("int8.row*fp32"), v=Format("bf16"), heads=1, k_dim=16, v_dim=8, page=4)
    request = AttentionRequest(kv=kv, heads=2, scale=0.25, phase="decode", q=Format("bf16"), p=Format("fp32"), out=BF16)
    batch = ops.attention_batch(request, Limits(1, 1, 2))
    batch.plan(torch.tensor([1]), torch.tensor([3]), torch.tensor([[1, 0]], dtype=torch.int32))

    def filled() -> PagedAttention:
        g = torch.Generator().manual_seed(5)
        made = PagedAttention(ops, KVCache.allocate(kv, 2, "cpu"), batch, request)
        rows = torch.randn(2, 1, 16, generator=g).to(BF16), torch.randn(2, 1, 8, generator=g).to(BF16)
        made.write(*rows, torch.tensor([4, 5]))
        return made

    def step(paged: PagedAttention, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        paged.write(k, v, slots)
        return paged(q) + 1

    q, k, v = torch.randn(1, 2, 16).to(BF16), torch.randn(1, 1, 16).to(BF16), torch.randn(1, 1, 8).to(BF16)
    eager, graph, slots = filled(), filled(), torch.tensor([6])
    expected = step(eager, q, k, v, slots)
    assert torch.equal(compiled(lambda *a: step(graph, *a))(q, k, v, slots), expected)  # type: ignore[operator]
    for mine, theirs in zip(graph.planes, eager.planes, strict=True):
        assert torch.equal(mine, theirs)


def test_operators_keep_what_their_schemas_say() -> None:
    layer = prepare_linear(spec(), select("cpu_reference"))
    x = torch.randn(3, 64, dtype=BF16)
    torch.library.opcheck(torch.ops.qhal.linear.default, (x, layer.handle, False))


def test_a_layer_that_nobody_kept_is_one_clear_error() -> None:
    layer: PreparedLinear | None = prepare_linear(spec(), select("cpu_reference"))
    assert layer is not None
    number = layer.handle
    layer = None
    gc.collect()
    with pytest.raises(FormatError, match="keep what a compiled function uses"):
        torch.ops.qhal.linear(torch.randn(3, 64, dtype=BF16), number, False)
