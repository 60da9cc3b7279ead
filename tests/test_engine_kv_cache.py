"""The quantized cache of the transformers adapter: its numbers, batches with padding, chunks, beams, and refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qhal
from qhal.encoding import encode
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from qhal_engines import EngineError, kv_attention  # noqa: E402
from qhal_engines.kv_attach import _NAMES, attach, cache_name, detach, model_attention, new_cache  # noqa: E402
from qhal_engines.kv_attention import pattern  # noqa: E402
from qhal_engines.kv_cache import QhalLayer  # noqa: E402
from qhal_engines.kv_plan import CacheLayer, cache_layers  # noqa: E402
from qhal_portable.kv import read  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 2,
}
WINDOW = {"sliding_window": 7}
SLIDES = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "mistral_window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **WINDOW)),
    "gemma2_softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, **SLIDES, attn_logit_softcapping=2.0, query_pre_attn_scalar=24)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss_sinks": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, **SLIDES, num_local_experts=4, num_experts_per_tok=2)
    ),
}
OPS = qhal.select("cpu_reference")
pytestmark = pytest.mark.filterwarnings("ignore:the cache format:qhal_engines.EngineWarning")
NAME = next(n for n in _NAMES if n in inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
"""What the installed transformers calls the cache: an argument and a field of the output."""
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "sinks")):
            torch.nn.init.normal_(parameter, std=0.4)  # attention that is far from uniform
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


class NoCaches:
    """A checkpoint that says nothing of caches."""

    path, dtype = "checkpoint", torch.bfloat16

    def __init__(self, model: Any) -> None:
        self.config = model.config.to_dict()

    def kv_formats(self) -> dict[int, Any]:
        return {}


def with_cache(model: Any, kv_format: str) -> Any:
    checkpoint: Any = NoCaches(model)
    caches = cache_layers(checkpoint, kv_format, model_attention(model))
    attach(model, OPS, caches, {c.attention.layer: c.read(checkpoint) for c in caches}, model.dtype)
    return model


def held(output: Any) -> Any:
    """The cache of a model's output."""
    return getattr(output, NAME)


def given(cache: Any) -> dict[str, Any]:
    """The argument that goes on with a cache."""
    return {NAME: cache}


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 2e-5) -> bool:
    return bool((a.float() - b.float()).norm() <= bound * b.float().norm())


# ---------------------------------------------------------------- numbers


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_a_float_cache_gives_transformers_own_numbers(kind: str) -> None:
    """GQA, windows, soft-caps and sinks are those of the model's eager attention; fp32 rounding is all that differs."""
    model = build(kind)
    expected = model(IDS).logits
    own = model.generate(IDS, max_new_tokens=12, do_sample=False)
    with_cache(model, "fp32")
    assert close(model(IDS, use_cache=False).logits, expected)
    assert torch.equal(model(IDS).logits, model(IDS, use_cache=False).logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), own)
    detach(model)
    with pytest.raises(EngineError, match="has no quantized cache"):
        new_cache(model)
    assert torch.equal(model(IDS).logits, expected) and cache_name(model) is None


FAKE = [
    "fp8",
    "fp8_e5m2",
    "int8",
    "int4",
    "int4.g16*fp16",
    "uint4",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "int8,int4",
    "fp32,int4",
]


@torch.inference_mode()
@pytest.mark.parametrize("kv_format", FAKE)
def test_a_quantized_cache_equals_fake_quantized_keys_and_values_to_the_bit(
    kv_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_cache(build(dtype=torch.bfloat16), kv_format)
    request = model.model.layers[0].self_attn.qhal_kv.request
    k, v = request.k, request.v
    ours = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    stage = QhalLayer.update

    def fake(x: torch.Tensor, f: Format) -> torch.Tensor:
        block = "" if f.block is None else f.block.kind
        one = torch.ones(1) if block == "tensor" or (f.scale is not None and not f.scale.plain) else None
        return encode(x.float().reshape(-1, x.shape[-1]), f, scale=one).dequantize().reshape(x.shape)

    def update(self: QhalLayer, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return stage(self, fake(keys, k), fake(values, v))

    with_cache(model, "fp32")
    plain = model(IDS).logits
    monkeypatch.setattr(QhalLayer, "update", update)
    assert torch.equal(model(IDS).logits, ours)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), tokens)
    assert not torch.equal(plain, ours)


@torch.inference_mode()
def test_layers_that_a_checkpoint_leaves_out_keep_the_models_dtype() -> None:
    model = build()
    attention = model_attention(model)
    int4 = Format.parse("int4.row*fp32")
    checkpoint: Any = NoCaches(model)
    checkpoint.kv_formats = lambda: {1: KVFormat("mha", int4, int4, name="model.layers.1.self_attn")}
    checkpoint.kv_format = lambda layer: KVSpec(Operand(int4), Operand(int4))
    caches = cache_layers(checkpoint, None, attention, torch.float32)
    assert [str(c.format.k) for c in caches] == ["fp32", "int4.row*fp32"]
    attach(model, OPS, caches, {c.attention.layer: c.read(checkpoint) for c in caches}, model.dtype)
    assert cache_name(model) == "k=fp32 v=fp32; k=int4.row*fp32 v=int4.row*fp32"
    mixed = held(model(IDS))
    whole = held(with_cache(model, "fp32")(IDS))
    assert all(
        torch.equal(mixed.layers[0].cache.planes[n], whole.layers[0].cache.planes[n]) for n in ("k.codes", "v.codes")
    )
    assert mixed.nbytes < whole.nbytes


@torch.inference_mode()
def test_static_scales_of_a_checkpoint_reach_the_cache() -> None:
    model = build()
    fmt = Format.parse("int8.head*fp32")
    caches = []
    for a in model_attention(model):
        f = KVFormat("mha", fmt, fmt, None, None, a.kv_heads, a.k_dim, a.v_dim, a.name)
        caches.append(CacheLayer(a, f))
    scales = {0: torch.tensor([0.01, 0.02]), 1: torch.tensor([0.05, 0.03])}
    specs = {i: KVSpec(Operand(fmt, s), Operand(fmt, 2 * s), name=str(i)) for i, s in scales.items()}
    attach(model, OPS, caches, specs, model.dtype)
    cache = held(model(IDS[:1]))
    for i, s in scales.items():
        stored = cache.layers[i].cache
        assert torch.equal(stored.planes["k.scale"], s) and torch.equal(stored.planes["v.scale"], 2 * s)
        codes = read(stored, 0, torch.tensor(cache.sequences.pages[0]), 24) / s[None, :, None]
        assert close(codes, codes.round(), 1e-6) and codes.abs().max() > 5


# ---------------------------------------------------------------- batches, chunks, beams


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "mistral_window", "gemma2_softcap", "gpt_oss_sinks"])
@pytest.mark.parametrize("kv_format", ["int8,int4", "fp8"])
def test_a_padded_batch_generates_what_its_sequences_generate_alone(kind: str, kv_format: str) -> None:
    model = with_cache(build(kind), kv_format)
    prompts = [IDS[0, :19], IDS[1, :4], IDS[0, 5:17]]
    width = max(len(p) for p in prompts)
    batch = torch.stack([torch.cat([torch.full((width - len(p),), 2), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=20, do_sample=False)
        assert torch.equal(row[width:], alone[0, len(prompt) :])


@torch.inference_mode()
def test_padding_is_neither_stored_nor_seen() -> None:
    model = with_cache(build(), "int8")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :21] = 0
    cache = held(model(IDS, attention_mask=mask))
    assert cache.sequences.real.sum(1).tolist() == [24, 3] and cache.sequences.pages == [[0, 1], [2]]
    stored = cache.layers[0].cache
    assert stored.planes["k.codes"][2, 3:].eq(0).all() and stored.planes["k.codes"][2, :3].ne(0).any()
    alone = held(model(IDS[1:, 21:])).layers[0].cache  # the same rows, but rotated to other positions: V has none
    assert torch.equal(stored.planes["v.codes"][2, :3], alone.planes["v.codes"][0, :3])
    right = torch.ones(2, 24, dtype=torch.long)
    right[1, 10:] = 0  # padding behind tokens
    logits = model(IDS, attention_mask=right).logits
    assert close(logits[1, :10], model(IDS[1:, :10]).logits[0])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_a_prefill_in_chunks_equals_one_prefill(kind: str) -> None:
    model = with_cache(build(kind), "int4.g16*fp16")
    whole = model(IDS)
    cache = new_cache(model)
    parts, start = [], 0
    for length in (5, 1, 11, 7):
        parts.append(model(IDS[:, start : start + length], **given(cache)).logits)
        start += length
    assert close(torch.cat(parts, 1), whole.logits)
    assert cache.get_seq_length() == 24 and cache.sequences.pages != held(whole).sequences.pages  # other page tables
    for b in range(2):
        k, expected = (read(c.layers[0].cache, 0, torch.tensor(c.sequences.pages[b]), 24) for c in (cache, held(whole)))
        assert torch.equal(k, expected)


@torch.inference_mode()
def test_beams_crops_and_selections_move_pages() -> None:
    model = build()
    wanted = model.generate(IDS, max_new_tokens=24, num_beams=3, do_sample=False)
    with_cache(model, "fp32")
    assert torch.equal(model.generate(IDS, max_new_tokens=24, num_beams=3, do_sample=False), wanted)

    with_cache(model, "int8")
    one = model(IDS).logits
    cache = new_cache(model)
    model(torch.cat([IDS, IDS[:, :9]], 1), **given(cache))
    cache.crop(-33 + 20)
    assert close(model(IDS[:, 20:], **given(cache)).logits, one[:, 20:])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    assert close(model(IDS[1:, 23:].repeat(2, 1), **given(cache)).logits, one[1:, 23:].repeat(2, 1, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert close(model(IDS[:1], **given(cache)).logits, one[:1])
    with pytest.raises(ValueError, match="crop"):
        cache.crop(5)


@torch.inference_mode()
def test_all_layers_share_one_planned_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, planned = [], []
    attention_batch = type(OPS).attention_batch

    def counted(self: Any, request: Any, limits: Any) -> Any:
        batch = attention_batch(self, request, limits)
        made.append(request.phase)
        plan = batch.plan
        batch.plan = lambda *a, **k: (planned.append(request.phase), plan(*a, **k))[1]  # type: ignore[method-assign]
        return batch

    monkeypatch.setattr(type(OPS), "attention_batch", counted)
    model = with_cache(build(), "fp8")
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert made == ["prefill", "decode"] and planned == ["prefill", *["decode"] * 5]


# ---------------------------------------------------------------- what is refused


@torch.inference_mode()
def test_calls_that_would_give_other_numbers_are_refused_by_name() -> None:
    model = with_cache(build(), "int8")
    dynamic, static = transformers.DynamicCache(), transformers.StaticCache(model.config, 32)
    plain = build()
    plain(IDS, **given(dynamic))
    one = model(IDS)
    for match, call in {
        "DynamicCache": lambda: model(IDS, **given(dynamic)),
        "StaticCache": lambda: model(IDS, **given(static)),
        "another model": lambda: model(IDS, **given(held(with_cache(build(), "int8")(IDS)))),
        r"attention_mask of shape|mask of its own": lambda: model(IDS, attention_mask=torch.ones(2, 1, 24, 24)),
        "packed": lambda: model(IDS, position_ids=torch.arange(12).repeat(2)[None], use_cache=False),
        r"attention_mask is \(2, 3\)": lambda: model(IDS[:, :3], **given(held(one)), attention_mask=torch.ones(2, 3)),
        "cannot be masked afterwards": lambda: model(
            IDS[:, :1], **given(held(one)), attention_mask=torch.arange(25)[None].gt(2).expand(2, -1)
        ),
        "holds 2 sequences": lambda: model(IDS[:1, :1], **given(held(one))),
        "swan": lambda: model(IDS, swan=torch.ones(1)),
    }.items():
        with pytest.raises(EngineError, match=match):
            call()
    assert model(IDS).logits.isfinite().all()


@torch.inference_mode()
def test_a_window_over_padding_behind_tokens_is_refused() -> None:
    model = with_cache(build("mistral_window"), "int8")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 10:] = 0
    with pytest.raises(EngineError, match="padding that stands behind"):
        model(IDS, attention_mask=mask)


@torch.inference_mode()
def test_another_attention_over_a_quantized_cache_is_refused() -> None:
    model = with_cache(build(), "int8")
    model.set_attn_implementation("sdpa")
    for use_cache in (True, False):
        with pytest.raises(EngineError, match="attention 'sdpa' for a model whose cache is quantized"):
            model(IDS, use_cache=use_cache)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_masks_are_known_by_what_they_let_through(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_attention, "_BLOCK", 100)  # several blocks
    causal = masking_utils.causal_mask_function
    sliding = causal if window is None else masking_utils.sliding_window_causal_mask_function(window)
    sizes = {"batch_size": 2, "q_length": 9, "q_offset": 21, "kv_length": 30}
    assert pattern(**sizes, mask_function=sliding, local_size=window).window == window
    chunked = masking_utils.chunked_causal_mask_function(window or 4, torch.zeros(2, dtype=torch.int64))
    others = [masking_utils.bidirectional_mask_function]
    if window not in (1, 40):  # chunks of one token are windows of one, a chunk longer than all is causal
        others.append(chunked)
    for other in others:
        with pytest.raises(EngineError, match="a pattern other than"):
            pattern(**sizes, mask_function=other, local_size=window)


@torch.inference_mode()
def test_attention_that_was_not_planned_is_refused() -> None:
    model = with_cache(build("gemma2_softcap"), "int8")
    model.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(EngineError, match=r"layers\.1\.self_attn asks for attention with scale="):
        model(IDS)


def test_a_model_that_reaches_for_the_keys_is_refused() -> None:
    model = with_cache(build(), "int8")
    layer = QhalLayer(model.model.layers[0].self_attn.qhal_kv)
    key, value = layer.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32))
    for use in (lambda: key.shape, lambda: value[0], lambda: torch.cat([key, value])):
        with pytest.raises(EngineError, match="behind its cache"):
            use()
    with pytest.raises(EngineError, match="never reached the attention function"):
        layer.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32))
    with pytest.raises(EngineError, match="the plan has 2 heads of 32"):
        QhalLayer(model.model.layers[0].self_attn.qhal_kv).update(torch.zeros(1, 4, 3, 32), torch.zeros(1, 2, 3, 32))


def test_models_without_such_attention_are_refused() -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    latent = transformers.DeepseekV3Config(**sizes, q_lora_rank=16, kv_lora_rank=16)
    with torch.device("meta"):
        for match, model in {
            "MLA": transformers.DeepseekV3ForCausalLM(latent),
            "has an encoder": transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, num_layers=1)),
            "no self-attention module in layer": transformers.MambaForCausalLM(
                transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=16)
            ),
        }.items():
            with pytest.raises(EngineError, match=match):
                model_attention(model)
