"""Which cache a model gets: words, the checkpoint's own formats and scales, the plan, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import qhal
from qhal.errors import CheckpointError, FormatError, PlanError, QhalError
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal_cli.app import app
from qhal_engines import EngineError, EngineWarning
from qhal_engines.kv_pages import Sequences
from qhal_engines.kv_plan import attention_layers, cache_layers, plan_with_caches
from qhal_schemes import open_checkpoint
from qhal_schemes.kv_words import KV_WORDS, parse_kv

MODEL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 64,
}


@pytest.mark.parametrize(
    "text, k, v",
    [
        *((word, name, name) for word, name in KV_WORDS.items()),
        ("int8,int4", "int8.row*fp32", "int4.row*fp32"),
        ("mxfp8 , bf16", "e4m3fn.g32*e8m0", "bf16"),
        ("int8.row*fp32@qmax=127.5,round=away", *["int8.row*fp32@qmax=127.5,round=away"] * 2),
        ("int8.row*fp32@qmax=127.5,round=away,fp8", "int8.row*fp32@qmax=127.5,round=away", "e4m3fn.tensor*fp32"),
    ],
)
def test_words_and_names_of_cache_formats(text: str, k: str, v: str) -> None:
    assert parse_kv(text) == (Format.parse(k), Format.parse(v))
    assert parse_kv(",".join(map(str, parse_kv(text)))) == parse_kv(text)  # full names mean themselves


@pytest.mark.parametrize("text", ["", "fp8,", "fp8,int8,int4", "fp9", "e4m3", "fp8 int8"])
def test_a_wrong_word_is_one_error_with_the_words(text: str) -> None:
    with pytest.raises(FormatError, match="cache format"):
        parse_kv(text)


def test_every_word_runs_on_the_reference() -> None:
    ops = qhal.select("cpu_reference")
    for word in (*KV_WORDS, "mxfp8", "mxfp4", "nvfp4", "bf16", "fp32"):
        k, v = parse_kv(word)
        assert ops.supports(KVRequest(kind="mha", k=k, v=v, heads=2, k_dim=64, v_dim=64, page=16)), word


# ---------------------------------------------------------------- checkpoints


SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.fixture
def fp8_cache(write_checkpoint: Callable[..., Path]) -> Path:
    """bf16 weights with an fp8 cache of stored scales."""
    tensors: dict[str, torch.Tensor] = {}
    for i in range(2):
        for name, rows in (("q", 128), ("k", 64), ("v", 64)):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] = torch.zeros(rows, 64, dtype=torch.bfloat16)
        for part in "kv":
            tensors[f"model.layers.{i}.self_attn.{part}_scale"] = torch.tensor([0.5 + i], dtype=torch.bfloat16)
    group = {"targets": ["Linear"], "weights": {**SCHEME, "type": "int"}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["re:.*"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": SCHEME,
    }
    return write_checkpoint(tensors, quantization, model=MODEL)


@pytest.fixture
def plain(write_checkpoint: Callable[..., Path]) -> Path:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)]
    return write_checkpoint(dict.fromkeys(names, weight), model=MODEL, name="plain")


def test_auto_is_what_the_checkpoint_says(fp8_cache: Path, plain: Path) -> None:
    checkpoint = open_checkpoint(fp8_cache)
    for word in (None, "auto"):
        caches = cache_layers(checkpoint, word)
        assert [str(c.format) for c in caches] == ["mha(k=e4m3fn.tensor*bf16, v=e4m3fn.tensor*bf16)"] * 2
        assert [float(c.read(checkpoint).k.scale) for c in caches] == [0.5, 1.5]  # type: ignore[arg-type]
        assert cache_layers(open_checkpoint(plain), word) == []


def test_stored_scales_serve_an_asked_format_of_the_same_kind(fp8_cache: Path) -> None:
    checkpoint = open_checkpoint(fp8_cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caches = cache_layers(checkpoint, "fp8,int8")
    spec = caches[1].read(checkpoint)
    assert float(spec.k.scale) == 1.5 and spec.v.scale is None and str(spec.v.format) == "int8.row*fp32"  # type: ignore[arg-type]
    with pytest.warns(EngineWarning, match=r"e4m3fn\.head\*fp32 has static scales .* they are 1"):
        spec = cache_layers(checkpoint, "fp8_head")[1].read(checkpoint)
    assert spec.k.scale is None and spec.v.scale is None


def test_static_integers_without_scales_are_refused(fp8_cache: Path, plain: Path) -> None:
    for name in ("int8.tensor*fp32", "int8.head*fp32", "int8.col*fp32", "bf16,int8.tensor*fp32"):
        for folder in (fp8_cache, plain):
            with pytest.raises(FormatError, match=r"int8\.\w+\*fp32 of [kv] needs scales that the checkpoint does not"):
                cache_layers(open_checkpoint(folder), name)


@pytest.mark.filterwarnings("ignore:the cache format:qhal_engines.EngineWarning")
def test_the_plan_lists_caches_and_both_attentions(fp8_cache: Path) -> None:
    ops, checkpoint = qhal.select("cpu_reference"), open_checkpoint(fp8_cache)
    for word, name in ((None, "e4m3fn.tensor*bf16"), ("nvfp4", "e2m1.g16*(e4m3fn.tensor*fp32)")):
        plan = plan_with_caches(checkpoint, ops, "error", word)
        kinds = [(type(e.request), getattr(e.request, "phase", None), len(e.layers)) for e in plan.entries]
        assert kinds == [(KVRequest, None, 2), (AttentionRequest, "prefill", 2), (AttentionRequest, "decode", 2)]
        assert all(str(e.request).count(f"k={name} v={name} heads=2 dims=32,32") == 1 for e in plan.entries)
    with pytest.raises(PlanError, match="refuses 3 of 3"):
        plan_with_caches(checkpoint, ops, "allow", "mxfp6_e2m3")


def test_the_command_line_plans_with_a_cache_format(plain: Path) -> None:
    asked = ["plan", str(plain), "--backend", "cpu_reference", "--kv-format", "int8,int4", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    requests = [e["request"] for e in json.loads(done.stdout)["entries"]]
    assert len(requests) == 3 and all("k=int8.row*fp32 v=int4.row*fp32" in r for r in requests)
    refused = CliRunner().invoke(app, [*asked[:-2], "mxfp6_e3m2", "--json"])
    assert refused.exit_code == 1
    assert {e["status"] for e in json.loads(refused.stdout)["plan"]["entries"]} == {"refused"}


# ---------------------------------------------------------------- what config.json says of attention


def test_windows_caps_sinks_and_scales_of_the_configuration() -> None:
    base = attention_layers(MODEL)
    assert [(a.heads, a.kv_heads, a.k_dim, a.window, a.scale) for a in base] == [(4, 2, 32, None, 32**-0.5)] * 2
    assert [a.window for a in attention_layers({**MODEL, "sliding_window": 9})] == [9, 9]
    assert [a.window for a in attention_layers({**MODEL, "sliding_window": 9, "use_sliding_window": False})] == [
        None
    ] * 2
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
    assert [a.window for a in attention_layers({**MODEL, **kinds})] == [None, 9]
    gemma = attention_layers({**MODEL, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 64})[0]
    assert (gemma.softcap, gemma.scale) == (50.0, 0.125)
    assert attention_layers({**MODEL, "model_type": "gpt_oss"})[0].sinks
    assert attention_layers({"text_config": MODEL})[1].layer == 1
    without = {k: v for k, v in MODEL.items() if k not in ("head_dim", "num_key_value_heads")}
    assert (attention_layers(without)[0].kv_heads, attention_layers(without)[0].k_dim) == (4, 16)


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"kv_lora_rank": 64}, EngineError, "MLA"),
        ({"layer_types": ["full_attention", "linear_attention"]}, EngineError, "layer 1 is 'linear_attention'"),
        ({"num_kv_shared_layers": 1}, EngineError, "share their keys"),
        ({"num_attention_heads": None}, CheckpointError, "num_attention_heads is None"),
        ({"num_key_value_heads": "2"}, CheckpointError, "num_key_value_heads is '2'"),
        ({"sliding_window": 0}, CheckpointError, "sliding_window is 0"),
        ({"attn_logit_softcapping": -1}, CheckpointError, "attn_logit_softcapping is -1"),
        ({"layer_types": ["full_attention"]}, CheckpointError, "must name each of 2 layers"),
    ],
)
def test_models_without_such_a_cache_are_refused(changes: dict[str, Any], error: type[QhalError], match: str) -> None:
    with pytest.raises(error, match=match):
        attention_layers({**MODEL, **changes})


# ---------------------------------------------------------------- pages


@given(st.data())
def test_pages_hold_every_real_token_once_and_in_order(data: st.DataObject) -> None:
    """Against a plain model: one list of (sequence, column) per slot, written step by step."""
    batch = data.draw(st.integers(1, 4))
    sequences, written, real = Sequences(4, torch.device("cpu")), {}, torch.zeros(batch, 0, dtype=torch.bool)
    for _ in range(data.draw(st.integers(1, 5))):
        columns, start = data.draw(st.integers(1, 7)), real.shape[1]
        new = data.draw(st.lists(st.booleans(), min_size=batch * columns, max_size=batch * columns))
        real = torch.cat([real, torch.tensor(new).view(batch, columns)], 1)
        step = sequences.step(start, batch, columns, real)
        assert sequences.step(start, batch, columns, None) is step  # the next layer shares it
        rows = [(b, start + c) for b in range(batch) for c in range(columns)]
        for row, slot, there in zip(rows, step.slots.tolist(), real[:, start:].flatten().tolist(), strict=True):
            assert (slot >= 0) == there and slot not in written
            if there:
                written[slot] = row
        if data.draw(st.booleans()):
            lost = data.draw(st.integers(0, real.shape[1]))
            sequences.crop(lost)
            real = real[:, : real.shape[1] - lost]
            written = {slot: row for slot, row in written.items() if row[1] < real.shape[1]}
        if data.draw(st.booleans()):
            chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
            pages = sequences.select(torch.tensor(chosen)).tolist()
            moved = {}
            for page, old in enumerate(pages):
                owner = next(b for b, own in enumerate(sequences.pages) if page in own)
                for at in range(4):
                    if old * 4 + at in written:
                        moved[page * 4 + at] = (owner, written[old * 4 + at][1])
            written, real = moved, real[chosen]
        for b, own in enumerate(sequences.pages):
            count = int(real[b].sum())
            slots = [own[i // 4] * 4 + i % 4 for i in range(count)]
            assert [written[slot] for slot in slots] == [(b, c) for c in real[b].nonzero().flatten().tolist()]
