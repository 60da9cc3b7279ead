"""torchao: tensor subclasses from the metadata of the file, by their arithmetic; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qhal
from qhal.encoding import encode
from qhal.errors import CheckpointError
from qhal_schemes import open_checkpoint
from qhal_schemes.packing import pack_nibbles

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q, H = "model.layers.0.self_attn.q_proj", "lm_head"
N, K = 8, 64
INT8 = "Int8WeightOnlyConfig"
PER_ROW = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}}


def described(kind: str, parts: Tensors, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": data, "_tensor_data_names": list(parts)}


def store(
    write: Write, parts: Tensors, said: Any, quant_type: str = INT8, name: str = f"{Q}.weight", **more: Any
) -> Path:
    """A folder with one quantized weight and a plain head."""
    module, _, leaf = name.rpartition(".")
    section = {"quant_method": "torchao", "quant_type": {"default": {"_type": quant_type, "_data": {}}}} | more
    folder = write({}, section)
    tensors = {f"{module}._{leaf}_{part}": t for part, t in parts.items()} | {
        f"{H}.weight": torch.ones(4, K).bfloat16()
    }
    metadata = {name: json.dumps(said), f"{H}.weight": '{"_type": "Tensor"}', "tensor_names": "[]", "format": "pt"}
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def int8(**more: torch.Tensor) -> Tensors:
    g = torch.Generator().manual_seed(0)
    parts = {
        "qdata": torch.randint(-128, 128, (N, K), generator=g).to(torch.int8),
        "scale": torch.rand(N, 1, generator=g) + 0.1,
        "zero_point": torch.randint(-3, 4, (N, 1), generator=g).to(torch.int8),
    }
    return parts | more


def test_int8_weights(write_checkpoint: Write) -> None:
    parts = int8()
    ckpt = open_checkpoint(store(write_checkpoint, parts, described("Int8Tensor", parts, block_size=[1, K])))
    w = (parts["qdata"].float() - parts["zero_point"].float()) * parts["scale"]
    assert torch.equal(ckpt.stored(Q), w) and str(ckpt.format(Q).weight) == "int8-int8.row*fp32"
    assert list(ckpt.excluded) == [H]
    assert torch.equal(ckpt.linear_spec(Q, shard=(1, 1, 2)).stored(), w[:, K // 2 :])
    assert torch.equal(ckpt.linear_spec(Q, shard=(0, 1, 2)).stored(), w[N // 2 :])


@pytest.mark.parametrize("size", [[1, 32], [N, K], [2, 32]])
def test_other_blocks(write_checkpoint: Write, size: list[int]) -> None:
    parts = int8(scale=torch.rand(N // size[0], K // size[1]) + 0.1)
    del parts["zero_point"]
    ckpt = open_checkpoint(store(write_checkpoint, parts, described("Int8Tensor", parts, block_size=size)))
    spread = parts["scale"].repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    assert torch.equal(ckpt.stored(Q), parts["qdata"].float() * spread)


@pytest.mark.parametrize("static", [False, True])
def test_int8_inputs(write_checkpoint: Write, static: bool) -> None:
    parts = int8(
        act_pre_scale=torch.linspace(0.5, 2, K), **({"act_quant_scale": torch.tensor([[0.02]])} if static else {})
    )
    grain = PER_ROW if not static else {"granularity": {"_type": "PerTensor", "_data": {}}}
    kwargs = {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": grain | {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}},
    }
    said = described("Int8Tensor", parts, block_size=[1, K], act_quant_kwargs=kwargs)
    ckpt = open_checkpoint(store(write_checkpoint, parts, said, "Int8DynamicActivationInt8WeightConfig"))
    spec = ckpt.spec(Q)
    assert spec.input is not None and spec.input.static == static
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)) * parts["act_pre_scale"]
    scale = torch.tensor(0.02) if static else x.abs().amax(-1, keepdim=True) / 127.5
    want = (x * (1.0 / scale)).round().clamp(-128, 127) * scale
    assert torch.equal(encode(x, spec.input.format, scale=spec.input.scale).dequantize(), want)
    assert ckpt.load_linear(Q, qhal.select("cpu_reference"))(torch.ones(2, K).bfloat16()).isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_float8(write_checkpoint: Write, dynamic: bool) -> None:
    parts = {"qdata": torch.randn(N, K).to(torch.float8_e4m3fn), "scale": torch.rand(N, 1) + 0.1}
    kwargs = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": PER_ROW} if dynamic else None
    said = described("Float8Tensor", parts, block_size=[1, K], act_quant_kwargs=kwargs)
    ckpt = open_checkpoint(store(write_checkpoint, parts, said, "Float8WeightOnlyConfig"))
    assert torch.equal(ckpt.stored(Q), parts["qdata"].float() * parts["scale"])
    assert str(ckpt.format(Q).input) == ("e4m3fn.row*fp32" if dynamic else "None")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8_e4m3fn"])
def test_int4(write_checkpoint: Write, dtype: str | None) -> None:
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(0))
    scale, zero = (torch.rand(K // 32, N).bfloat16() + 0.1 for _ in range(2))
    parts = {"qdata": pack_nibbles(codes.to(torch.uint8)).view(torch.int8), "scale": scale, "zero_point": zero}
    kwargs = {} if dtype is None else {"activation_dtype": {"_type": "torch.dtype", "_data": dtype}}
    said = described("Int4Tensor", parts, block_size=[1, 32], shape=[N, K], **kwargs)
    ckpt = open_checkpoint(store(write_checkpoint, parts, said, "Int4WeightOnlyConfig"))
    per_row = [t.float().t().repeat_interleave(32, 1) for t in (scale, zero)]
    assert torch.equal(ckpt.stored(Q), codes.float() * per_row[0] + per_row[1])
    assert str(ckpt.format(Q).input) == ("e4m3fn.row*fp32" if dtype == "float8_e4m3fn" else "None")


def refuse(
    write: Write, match: str, parts: Tensors, said: Any, *arguments: Any, late: bool = False, **more: Any
) -> None:
    with pytest.raises(CheckpointError, match=match):
        ckpt = open_checkpoint(store(write, parts, said, *arguments, **more))
        assert late
        ckpt.spec(Q)


KWARGS = {"_type": "QuantizeTensorToInt8Kwargs"}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"block_size": [1]}, r"block_size: divisors of \[8, 64\], found \[1\]"),
        ({"block_size": [1, 48]}, "block_size: divisors"),
        ({"block_size": [1, 0]}, "block_size: divisors"),
        ({"block_size": [2, 64]}, r"_weight_scale: expected .*\[4, 1\], found F32 \[8, 1\]"),
        ({"act_quant_kwargs": 3}, "act_quant_kwargs: a QuantizeTensorToInt8Kwargs"),
        ({"act_quant_kwargs": KWARGS | {"_data": {"granularity": {"_type": "PerBlock"}}}}, "unsupported: .*PerBlock"),
        ({"act_quant_kwargs": KWARGS | {"_data": PER_ROW | {"reduce_range": True}}}, "unsupported: .*reduce_range"),
        ({"act_quant_kwargs": KWARGS | {"_data": PER_ROW | {"mapping_type": "ASYMMETRIC"}}}, "unsupported: .*ASYMM"),
    ],
)
def test_attributes_that_do_not_fit(write_checkpoint: Write, data: dict[str, Any], match: str) -> None:
    refuse(write_checkpoint, match, int8(), described("Int8Tensor", int8(), **{"block_size": [1, K]} | data))


def test_descriptions_that_do_not_fit(write_checkpoint: Write) -> None:
    parts = int8()
    good = described("Int8Tensor", parts, block_size=[1, K])
    cases: list[tuple[Any, str, dict[str, Any]]] = [
        (good | {"_type": "MXTensor"}, "unsupported: .*is a MXTensor; can be read: Int8Tensor", {}),
        (good, "expected Float8Tensor, as quant_type says, found Int8Tensor", {"quant_type": "Float8WeightOnlyConfig"}),
        (good, "unsupported: .*quant_type 'NF4Config'; can be read", {"quant_type": "NF4Config"}),
        (good, "quant_type: expected an object with the _type", {"quant_type": None}),
        (good | {"_data": []}, "_data: an object", {}),
        (good | {"_tensor_data_names": ["qdata"]}, "_tensor_data_names: qdata, scale and some of", {}),
        (good | {"_tensor_data_names": ["qdata", "scale"]}, "_weight_zero_point is extra", {}),
        (good | {"_tensor_data_names": [*parts, "act_quant_scale"]}, "_weight_act_quant_scale is missing", {}),
        ({"_type": "Tensor"}, "q_proj._weight_qdata is there, but the metadata", {}),
        ([], "q_proj._weight_qdata is there, but the metadata", {}),
        (good, "unsupported: .*only weights of Linear modules", {"name": "model.embed_tokens.weight"}),
        (good, "is excluded by modules_to_not_convert", {"modules_to_not_convert": ["q_proj"]}),
    ]
    for i, (said, match, more) in enumerate(cases):

        def write(*a: Any, i: int = i, **k: Any) -> Path:
            return write_checkpoint(*a, **k, name=str(i))

        refuse(write, match, parts, said, **more)


def test_values_are_checked(write_checkpoint: Write) -> None:
    parts = int8(scale=torch.full((N, 1), float("nan")))
    refuse(
        write_checkpoint,
        "_weight_scale: expected finite",
        parts,
        described("Int8Tensor", parts, block_size=[1, K]),
        late=True,
    )
