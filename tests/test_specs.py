"""Layer specs: tensor-parallel parts make up the whole layer, fusions refuse differing inputs, summaries are frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qhal import (
    Activation,
    CodebookSegment,
    CodebookTensor,
    Dense,
    Diagonal,
    ExpertsSpec,
    Format,
    FormatError,
    Hadamard,
    KVSpec,
    LinearSpec,
    Operand,
    Permutation,
    QTensor,
    ShardError,
)
from qhal.encoding import encode

N, K = 16, 64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(name: str = "int4_g32", *shape: int, seed: int = 0) -> QTensor:
    return encode(random(*(shape or (N, K)), seed=seed), Format.parse(name))


def output(spec: LinearSpec, x: torch.Tensor) -> torch.Tensor:
    y = x.double() @ spec.effective().double().mT
    return y if spec.bias is None else y + spec.bias.double()


@pytest.mark.parametrize("w", [weight(), random(N, K).bfloat16()], ids=["int4", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_column_parallel_parts_join(w: Any, world: int) -> None:
    spec = LinearSpec(
        w, bias=random(N, seed=1), rotate_in=(Hadamard(64),), rotate_out=(Diagonal(random(N, seed=2)),), name="m"
    )
    x = random(3, K, seed=3)
    parts = [spec.shard(0, r, world) for r in range(world)]
    torch.testing.assert_close(torch.cat([output(p, x) for p in parts], -1), output(spec, x))
    assert all(p.name == "m" for p in parts)


@pytest.mark.parametrize("w", [weight(), random(N, K)], ids=["int4", "fp32"])
def test_row_parallel_parts_sum_and_the_bias_is_on_rank_0(w: Any) -> None:
    spec = LinearSpec(
        w,
        bias=random(N, seed=1),
        rotate_in=(Diagonal(random(K, seed=2)), Hadamard(16)),
        low_rank=(random(4, K, seed=4), random(N, 4, seed=5)),
    )
    x = random(3, K, seed=3)
    parts = [spec.shard(1, r, 2) for r in range(2)]
    assert parts[0].bias is not None
    assert parts[1].bias is None
    total = sum(output(p, piece) for p, piece in zip(parts, x.chunk(2, -1), strict=True))
    torch.testing.assert_close(total, output(spec, x), atol=1e-5, rtol=1e-5)


def test_low_rank_rows_follow_the_output() -> None:
    spec = LinearSpec(weight(), low_rank=(random(4, K), random(N, 4)))
    x = random(3, K, seed=3)
    parts = [spec.shard(0, r, 2) for r in range(2)]
    torch.testing.assert_close(torch.cat([output(p, x) for p in parts], -1), output(spec, x))


def test_static_input_scales_follow_their_features() -> None:
    per_feature = Operand(Format.parse("int8-int8.col*fp32"), random(1, K).abs(), torch.zeros(1, K, dtype=torch.int8))
    spec = LinearSpec(weight(), input=per_feature)
    part = spec.shard(1, 1, 2).input
    assert part is not None
    assert per_feature.scale is not None
    assert part.scale is not None
    assert torch.equal(part.scale, per_feature.scale[:, K // 2 :])
    one = Operand(Format.parse("int8.tensor*fp32"), torch.ones(1))
    assert replace(spec, input=one).shard(1, 0, 2).input is one


def test_static_scales_of_decode_inputs_and_weight_operands_follow_the_cut() -> None:
    feature = Operand(Format.parse("int8.col*fp32"), random(1, K).abs())
    rows = Operand(Format.parse("e4m3fn.row*fp32"), random(N, 1).abs())
    tiles = Operand(Format.parse("e4m3fn.8x32*fp32"), torch.arange(4.0) + 1)
    spec = LinearSpec(weight(), input=feature, decode_input=feature, operand=rows)
    half = spec.shard(1, 1, 2)
    assert half.decode_input is not None
    assert half.operand is rows
    assert feature.scale is not None
    assert rows.scale is not None
    assert half.decode_input.scale is not None
    assert torch.equal(half.decode_input.scale, feature.scale[:, K // 2 :])
    top = spec.shard(0, 1, 2)
    assert top.operand is not None
    assert top.decode_input is feature
    assert top.operand.scale is not None
    assert torch.equal(top.operand.scale, rows.scale[N // 2 :])
    for dim, kept in ((0, [[3.0, 4.0]]), (1, [[2.0], [4.0]])):
        cut = replace(spec, operand=tiles).shard(dim, 1, 2).operand
        assert cut is not None
        assert cut.scale is not None
        assert cut.scale.tolist() == kept
    with pytest.raises(ShardError, match="inside a block of 8"):
        replace(spec, operand=tiles).shard(0, 0, 4)


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ((2, 0, 2), "dim 2: 0 cuts rows"),
        ((-1, 0, 2), "dim -1: 0 cuts rows"),
        ((1.0, 0, 2), "dim 1.0: 0 cuts rows"),
        ((0, 0, 0), "there is at least 1 rank"),
        ((0, 0.0, 2), "both are whole numbers"),
        ((0, 0, "2"), "both are whole numbers"),
        ((0, 2, 2), "ranks count from 0 to 1"),
    ],
)
def test_cuts_are_whole_numbers(cut: Any, text: str) -> None:
    for thing in (LinearSpec(weight()), LinearSpec(random(N, K)), weight()):
        with pytest.raises(ShardError, match=text):
            thing.shard(*cut)


def test_plain_weights_that_do_not_join() -> None:
    with pytest.raises(ShardError, match="nothing to fuse"):
        LinearSpec.concat([])
    for other in (random(N, K + 1), random(N, K).bfloat16(), random(2, N, K)):
        with pytest.raises(ShardError, match="weights of one dtype and one K join"):
            LinearSpec.concat([LinearSpec(random(N, K), name="a"), LinearSpec(other, name="b")])


@pytest.mark.parametrize(
    ("change", "dim", "text"),
    [
        ({"rotate_in": (Hadamard(64),)}, 1, "feature 0 or 32 lies inside a Hadamard rotation of 64"),
        ({"rotate_in": (Permutation(torch.randperm(64)),)}, 1, "inside a Permutation rotation of 64"),
        ({"rotate_out": (Hadamard(16),)}, 0, "feature 0 or 8 lies inside a Hadamard rotation of 16"),
        ({"rotate_out": (Dense(torch.eye(4)),)}, 1, "an output rotation must follow the sum over ranks"),
        ({"weight": weight("int4.g64*bf16")}, 1, "column 0 or 32 lies inside a block of 64"),
        ({"weight": random(15, 64)}, 0, "m: rows: 15 does not divide into 2"),
    ],
)
def test_cuts_that_are_refused(change: dict[str, Any], dim: int, text: str) -> None:
    spec = replace(LinearSpec(weight(), name="m"), **change)
    with pytest.raises(ShardError, match=text):
        spec.shard(dim, 0, 2)


def test_effective_folds_rotations() -> None:
    w, x = random(N, K), random(5, K, seed=1)
    chain_in = (Diagonal(random(K, seed=2)), Hadamard(16))
    chain_out = (Dense(random(4, 4, seed=3)), Diagonal(random(N, seed=4)))
    spec = LinearSpec(w, rotate_in=chain_in, rotate_out=chain_out)
    step = x.double()
    for r in chain_in:
        step = step @ r.matrix(K)
    step = step @ w.double().T
    for r in chain_out:
        step = step @ r.matrix(N)
    torch.testing.assert_close(output(spec, x), step, atol=1e-5, rtol=1e-5)
    assert torch.equal(spec.stored(), w)
    assert torch.equal(LinearSpec(w).effective(), w)


# ---------------------------------------------------------------- fusing


def test_concat_joins_weights_and_biases() -> None:
    parts = [
        LinearSpec(weight(seed=1), bias=random(N, seed=3), name="q"),
        LinearSpec(weight("int4_g32", 8, K, seed=2), name="k"),
    ]
    fused = LinearSpec.concat(parts)
    assert fused.name == "q+k"
    assert torch.equal(fused.stored(), torch.cat([p.stored() for p in parts]))
    assert fused.bias is not None
    assert torch.equal(fused.bias, torch.cat([random(N, seed=3), torch.zeros(8)]))
    plain = LinearSpec.concat([LinearSpec(random(4, K)), LinearSpec(random(8, K))])
    assert plain.weight.shape == (12, K)
    assert LinearSpec.concat(parts[:1]) is parts[0]


OTHER = Operand(Format.parse("e4m3fn.row*fp32"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": OTHER}, "their input quantization differs"),
        ({"input": Operand(Format.parse("int8.tensor*fp32"), torch.tensor([0.5]))}, "input quantization differs"),
        ({"decode_input": OTHER}, "their decode input differs"),
        ({"operand": OTHER}, "their weight operand differs"),
        ({"rotate_in": (Hadamard(32),)}, "their input rotation differs"),
        ({"rotate_out": (Hadamard(16),)}, "an output rotation or low-rank branch belongs to one projection"),
        ({"low_rank": (random(2, K), random(N, 2))}, "low-rank branch belongs to one"),
        ({"weight": random(N, K)}, "some weights are quantized and some are not"),
        ({"weight": weight("int8.row*fp32")}, "cannot fuse different formats: int4.g32.bf16, int8.row.fp32"),
    ],
)
def test_fusions_that_are_refused(change: dict[str, Any], text: str) -> None:
    first = LinearSpec(weight(), name="a", input=Operand(Format.parse("int8.tensor*fp32"), torch.tensor([0.25])))
    with pytest.raises(ShardError, match=text):
        LinearSpec.concat([first, replace(first, name="b", **change)])


def test_equal_static_inputs_fuse() -> None:
    def spec(value: float) -> LinearSpec:
        return LinearSpec(weight(), input=Operand(Format.parse("int8.tensor*fp32"), torch.tensor([value])))

    assert LinearSpec.concat([spec(0.25), spec(0.25)]).input is not None


# ---------------------------------------------------------------- experts


def experts(name: str, activation: Activation, *, bias: bool = True) -> ExpertsSpec:
    rows = 2 * 32 if activation.gated else 32
    gate_up = LinearSpec(
        weight(name, 4, rows, K, seed=1), bias=random(4, rows, seed=2) if bias else None, name="gate_up"
    )
    down = LinearSpec(weight(name, 4, K, 32, seed=3), bias=random(4, K, seed=4) if bias else None, name="down")
    return ExpertsSpec(gate_up, down, activation, name="experts")


@pytest.mark.parametrize("name", ["int4.g16*bf16", "int8.row*fp32", "e4m3fn.tensor*fp32", "e4m3fn.16x16*fp32", "nvfp4"])
@pytest.mark.parametrize("gated", [True, False])
def test_expert_shards_are_slices_of_the_values(name: str, gated: bool) -> None:
    spec = experts(name, Activation(gated=gated))
    up, down = spec.gate_up.stored(), spec.down.stored()
    for rank in range(2):
        part = spec.shard(rank, 2)
        rows = torch.arange(16 * rank, 16 * rank + 16)
        rows = torch.cat([rows, rows + 32]) if gated else rows
        assert torch.equal(part.gate_up.stored(), up[:, rows])
        assert torch.equal(part.down.stored(), down[:, :, 16 * rank : 16 * rank + 16])
        assert part.gate_up.bias is not None
        assert spec.gate_up.bias is not None
        assert torch.equal(part.gate_up.bias, spec.gate_up.bias[:, rows])
        assert (part.down.bias is None) == (rank > 0)


def test_expert_shards_take_the_low_rank_branch_along() -> None:
    spec = experts("bf16", Activation(gated=True))
    inner, k = spec.down.weight.shape[-1], spec.gate_up.weight.shape[-1]
    branch = (random(4, k, seed=7), random(2 * inner, 4, seed=8))
    spec = replace(spec, gate_up=replace(spec.gate_up, low_rank=branch))
    whole = spec.gate_up.effective()
    for rank in range(2):
        start, stop = rank * inner // 2, (rank + 1) * inner // 2
        rows = torch.cat([whole[:, start:stop], whole[:, inner + start : inner + stop]], 1)
        assert torch.equal(spec.shard(rank, 2).gate_up.effective(), rows)
    rotated = replace(spec, gate_up=replace(spec.gate_up, rotate_out=(Diagonal(torch.ones(2 * inner)),)))
    with pytest.raises(ShardError, match="output rotation over gate and up"):
        rotated.shard(0, 2)
    with pytest.raises(FormatError, match="the same for every expert"):
        replace(spec.gate_up, low_rank=(random(3, 4, k), random(3, 2 * inner, 4)))


def test_expert_selection() -> None:
    spec = experts("int4.g16*bf16", Activation())
    part = spec.experts(1, 2)
    assert torch.equal(part.gate_up.stored(), spec.gate_up.stored()[1:3])
    assert part.down.bias is not None
    assert spec.down.bias is not None
    assert torch.equal(part.down.bias, spec.down.bias[1:3])
    assert part.format.experts == 2
    assert (spec.format.gate_up.n, spec.format.gate_up.k, spec.format.down.n) == (64, K, K)
    with pytest.raises(ShardError, match="no experts 3:5"):
        spec.experts(3, 2)
    with pytest.raises(ShardError, match="experts: intermediate features: 32 does not divide into 3"):
        spec.shard(0, 3)
    with pytest.raises(ShardError, match="inside a block of 16"):
        spec.shard(0, 4)


def test_stacked_plain_weights_are_cut_along_their_own_axes() -> None:
    spec = LinearSpec(random(4, 8, K), bias=random(4, 8))
    part = spec.shard(0, 1, 2)
    assert torch.equal(part.stored(), spec.stored()[:, 4:])
    assert spec.bias is not None
    assert part.bias is not None
    assert torch.equal(part.bias, spec.bias[:, 4:])
    assert torch.equal(spec.shard(1, 1, 2).stored(), spec.stored()[:, :, K // 2 :])


def test_plain_experts_are_cut_and_selected() -> None:
    """They used to be refused."""
    for gated in (True, False):
        gate_up = LinearSpec(random(4, 64 if gated else 32, K).bfloat16(), bias=random(4, 64 if gated else 32))
        down = LinearSpec(random(4, K, 32).bfloat16(), name="down")
        spec = ExpertsSpec(gate_up, down, Activation(gated=gated))
        rows = torch.arange(16, 32)
        rows = torch.cat([rows, rows + 32]) if gated else rows
        part = spec.shard(1, 2)
        assert torch.equal(part.gate_up.stored(), gate_up.stored()[:, rows])
        assert part.gate_up.bias is not None and gate_up.bias is not None
        assert torch.equal(part.gate_up.bias, gate_up.bias[:, rows])
        assert torch.equal(part.down.stored(), down.stored()[:, :, 16:])
        some = spec.experts(1, 2)
        assert torch.equal(some.gate_up.stored(), gate_up.stored()[1:3])
        assert torch.equal(some.down.stored(), down.stored()[1:3])
        assert some.format.experts == 2
        with pytest.raises(ShardError, match=r"down: torch.bfloat16 \(4, 64, 32\): no experts 2:5"):
            replace(spec, gate_up=down).experts(2, 3)


def test_codebook_experts_are_refused_by_name() -> None:
    book = CodebookTensor((4, 8), (CodebookSegment(torch.zeros(4, 1, 1).int(), (torch.zeros(256, 1, 8),)),))
    spec = ExpertsSpec(LinearSpec(book, name="up"), LinearSpec(book, name="down"), Activation(gated=False))
    with pytest.raises(ShardError, match=r"up: codebook weights are not stacked \(vq1x8\[256\]\)"):
        spec.experts(0, 1)
    with pytest.raises(ShardError, match="up: codebook weights are not stacked"):
        spec.shard(0, 2)


INT8 = Format.parse("int8.tensor*fp32")


def test_static_scales_of_experts() -> None:
    parts = [Operand(INT8, torch.tensor([0.5 * (e + 1)]), torch.tensor([e])) for e in range(4)]
    own = Operand.stack(parts, "layer")
    assert own.per_expert and own.scale is not None and own.scale.tolist() == [[0.5], [1.0], [1.5], [2.0]]
    assert all(own.expert(e).equal(parts[e]) for e in range(4))
    assert own.experts(1, 2).equal(Operand.stack(parts[1:3], "layer"))
    assert not own.equal(replace(own, per_expert=False, scale=own.scale))
    same = Operand.stack([parts[0]] * 3, "layer")
    assert same.per_expert  # equal today: a refit of one expert must fit the old tensors
    dynamic = Operand(INT8)
    assert Operand.stack([dynamic, Operand(INT8)], "layer") is dynamic
    assert dynamic.expert(3) is dynamic is dynamic.experts(0, 1)
    with pytest.raises(ShardError, match=r"layer: experts that share a product quantize alike, not as .*static"):
        Operand.stack([parts[0], dynamic], "layer")
    with pytest.raises(ShardError, match=r"static zero points of int8.* cannot be stacked: none, torch.int64"):
        Operand.stack([parts[0], replace(parts[1], zero=None)], "layer")
    for scale in (None, torch.ones(4)):
        with pytest.raises(FormatError, match=r"per_expert needs static scales \[E, 1\] or \[E, K\], not"):
            Operand(INT8, scale, per_expert=True)
    features = Operand.stack([Operand(Format.parse("int8.col*fp32"), torch.rand(32)) for _ in range(4)], "down")
    spec = experts("int8.row*fp32", Activation())
    spec = replace(spec, gate_up=replace(spec.gate_up, input=own, operand=own), down=replace(spec.down, input=features))
    part = spec.experts(1, 2).shard(1, 2)
    assert part.gate_up.input is not None and part.gate_up.operand is not None and part.down.input is not None
    assert part.gate_up.input.equal(own.experts(1, 2))
    assert part.gate_up.operand.equal(own.experts(1, 2))
    assert part.down.input.scale is not None and features.scale is not None
    assert torch.equal(part.down.input.scale, features.scale[1:3, 16:])
    with pytest.raises(ShardError, match="32 static scales of the weight operand cannot follow gate and up"):
        replace(spec, gate_up=replace(spec.gate_up, operand=features)).shard(0, 2)


# ---------------------------------------------------------------- summaries


def test_format_is_a_frozen_summary() -> None:
    spec = LinearSpec(
        weight(),
        input=Operand(Format.parse("int8.tensor*fp32"), torch.ones(1)),
        rotate_in=(Hadamard(64),),
        low_rank=(random(4, K), random(N, 4)),
        bias=random(N),
        name="m",
    )
    f = spec.format
    assert (f.name, f.n, f.k, str(f.weight), str(f.input)) == ("m", N, K, "int4.g32*bf16", "int8.tensor*fp32")
    assert (f.static_input, f.low_rank, f.bias, f.group_index) == (True, 4, True, False)
    assert f.rotate_in == (("hadamard", 64, 1, "", False),)
    assert hash(f) == hash(replace(spec, weight=weight(seed=9)).format)
    assert f.quantized
    plain = LinearSpec(random(N, K).bfloat16()).format
    assert str(plain.weight) == "bf16"
    assert not plain.quantized
    index = replace(weight(), group_index=torch.zeros(K, dtype=torch.int32))
    assert LinearSpec(index).format.group_index
    book = CodebookTensor(
        (4, 8), (CodebookSegment(torch.zeros(4, 1, 1, dtype=torch.int32), (torch.zeros(256, 1, 8),)),)
    )
    assert str(LinearSpec(book).format.weight) == "vq1x8[256]"


def test_kv_summary() -> None:
    fp8 = Operand(Format.parse("e4m3fn.tensor*fp32"), torch.ones(1))
    spec = KVSpec(fp8, fp8, heads=2, k_dim=64, v_dim=64, name="layer")
    assert str(spec.format) == "mha(k=e4m3fn.tensor*fp32, v=e4m3fn.tensor*fp32)"
    assert hash(spec.format) == hash(KVSpec(fp8, fp8, heads=2, k_dim=64, v_dim=64, name="layer").format)
    latent = KVSpec(fp8, Operand(Format("bf16")), q=fp8, kind="mla")
    assert str(latent.format) == "mla(latent=e4m3fn.tensor*fp32, rope=bf16, q=e4m3fn.tensor*fp32)"


def test_operands_compare_by_value() -> None:
    a = Operand(Format.parse("int8.tensor*fp32"), torch.ones(1))
    assert a.equal(Operand(Format.parse("int8.tensor*fp32"), torch.ones(1)))
    assert not a.equal(Operand(Format.parse("int8.tensor*fp32")))
    assert not a.equal(Operand(Format.parse("int8.tensor*fp32"), torch.ones(1), clip=(0.9, 0.9)))
    assert not a.equal(None)
    assert a.static
