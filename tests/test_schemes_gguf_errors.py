"""GGUF files that are broken, lie or need what is not read: one clear error each, no memory taken on their word."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qhal.errors import CheckpointError, QhalError
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.gguf_blocks import TYPES

NUMBER = {kind.name: number for number, kind in TYPES.items()}
Q = "model.layers.0.self_attn.q_proj"


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, value: Any) -> bytes:
    """A key with a text, a u32, a float, or bytes that stand for type and value as they are."""
    if isinstance(value, bytes):
        return text(name) + value
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    kind, layout = (6, "<f") if isinstance(value, float) else (4, "<I")
    return text(name) + struct.pack("<I", kind) + struct.pack(layout, value)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: str | int, offset: int) -> bytes:
    number = NUMBER[kind] if isinstance(kind, str) else kind
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)


FACTS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
}
ROW = struct.pack("<e", 0.5) + bytes(range(16))  # one block of Q4_0
TENSORS = [tensor("blk.0.attn_q.weight", (64, 32), "Q4_0", 0), tensor("blk.0.attn_k.weight", (32, 32), "Q4_0", 1152)]
DATA = b"".join(struct.pack("<e", 0.5 + i) + bytes((i + j) % 256 for j in range(16)) for i in range(96))


def written(
    path: Path,
    facts: dict[Any, Any] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = DATA,
    *,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> Path:
    facts, tensors = FACTS if facts is None else facts, TENSORS if tensors is None else tensors
    head = start + struct.pack("<QQ", *(counts or (len(tensors), len(facts))))
    head += b"".join(key(k, v) for k, v in facts.items()) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def refused(action: Callable[[], object], match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        with pytest.raises(CheckpointError, match=match) as info:
            action()
    assert 20 < len(str(info.value)) < 2000


def test_the_file_is_good(tmp_path: Path) -> None:
    ckpt = open_checkpoint(written(tmp_path / "m.gguf"))
    assert ckpt.stored(Q).shape == (64, 32) and ckpt.config["vocab_size"] == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"start": b"PK\3\4" + struct.pack("<I", 3)}, r"no GGUF file: it starts with b'PK"),
        ({"start": b"GGUF" + struct.pack("<I", 1)}, "unsupported: .*GGUF of version 1; .*versions 2 and 3"),
        ({"start": b"GGUF" + struct.pack(">I", 3)}, "unsupported: .*GGUF of big endian, version 3"),
        ({"counts": (1 << 60, 7)}, "inside the header|truncated|no empty part"),
        ({"counts": (2, 1 << 63)}, "inside the header|truncated|unknown type|a text of"),
        ({"counts": (3, 7)}, "no empty part|inside the header"),
        ({"data": DATA[:-1]}, r"truncated: expected \d+ bytes, found \d+"),
        ({"data": DATA + bytes(32)}, "longer than its header says"),
        ({"facts": {**FACTS, "general.alignment": 48}}, "general.alignment: expected a power of two"),
        ({"facts": {**FACTS, "general.alignment": 1 << 31}}, "general.alignment: expected a power of two"),
        ({"facts": {**FACTS, "general.alignment": "32"}}, "general.alignment: expected a power of two"),
        ({"facts": {**FACTS, "x": struct.pack("<I", 13)}}, "x: unknown type 13"),
        ({"facts": {**FACTS, "x": struct.pack("<IIQ", 9, 9, 1)}}, "x: an array of type 9"),
        ({"facts": {**FACTS, "x": struct.pack("<IIQ", 9, 0, 1 << 62)}}, "inside the header"),
        ({"facts": {**FACTS, "x": struct.pack("<IIQ", 9, 8, 1 << 62)}}, "inside the header"),
        ({"facts": {**FACTS, "x": struct.pack("<IQ", 8, 1 << 62)}}, "x: a text of 46116860"),
        ({"facts": {**FACTS, "x": struct.pack("<IQ", 8, 1) + b"\xff"}}, "x: no UTF-8"),
        ({"facts": {**FACTS, b"llama.block_count": 1}}, "key 'llama.block_count' is duplicated"),
        ({"facts": {k: v for k, v in FACTS.items() if k != "general.architecture"}}, "general.architecture: expected"),
        ({"facts": FACTS | {"llama.attention.head_count": 0}}, "head_count: expected a number of heads for layer 0"),
        ({"facts": FACTS | {"llama.attention.head_count": 8}}, "rope.dimension_count: expected 8, the size of a head"),
        ({"facts": FACTS | {"llama.attention.head_count_kv": 4}}, "expected rows of 4 heads of 16 .*found 32 rows"),
        ({"facts": FACTS | {"llama.block_count": 2}}, "counts 2 layers, but model.layers has no tensor of layer 1"),
        ({"facts": FACTS | {"llama.block_count": "1"}}, "block_count: expected a count, found 1"),
        ({"facts": FACTS | {"llama.rope.freq_base": float("nan")}}, "freq_base: expected a positive number"),
    ],
)
def test_headers(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = written(tmp_path / "m.gguf", **change)
    refused(lambda: open_checkpoint(path), match)


@pytest.mark.parametrize(
    ("first", "match"),
    [
        (
            tensor("blk.0.attn_q.weight", (64, 32), "IQ2_XXS", 0),
            "unsupported: .*attn_q.weight is IQ2_XXS; can be read: F32",
        ),
        (tensor("blk.0.attn_q.weight", (64, 32), "NVFP4", 0), "unsupported: .*attn_q.weight is NVFP4; can be read"),
        (tensor("blk.0.attn_q.weight", (64, 32), 77, 0), "unsupported: .*GGML type 77, which is not known here"),
        (tensor("blk.0.attn_q.weight", (64, 48), "Q4_0", 0), r"Q4_0 \[64, 48\] is not made of blocks of 32"),
        (tensor("blk.0.attn_q.weight", (0, 32), "Q4_0", 0), r"Q4_0 \[0, 32\] is not made of blocks"),
        (tensor("blk.0.attn_q.weight", (1 << 40, 1 << 40), "Q4_0", 0), "truncated: .*takes .* bytes, the file has"),
        (tensor("blk.0.attn_q.weight", (1 << 63, 32), "Q4_0", 0), "is not made of blocks"),
        (tensor("blk.0.attn_q.weight", (64, 32), "Q4_0", 32), "attn_q.weight|attn_k.weight: corrupt offset"),
        (tensor("blk.0.attn_q.weight", (64, 32), "Q4_0", 1152), "corrupt offset"),
        (tensor("blk.0.attn_q.weight", (64, 32), "Q4_1", 0), "attn_k.weight: corrupt offset: starts at"),
        (tensor("blk.0.attn_q.weight", (2, 2, 2, 2, 32), "Q4_0", 0), "with 5 axes"),
        (tensor("blk.0.attn_q.weight", (), "Q4_0", 0), "with 0 axes"),
        (tensor("", (64, 32), "Q4_0", 0), "a name of 0 characters"),
        (tensor("a\nb.weight", (64, 32), "Q4_0", 0), "printable characters"),
        (tensor("blk..weight", (64, 32), "Q4_0", 0), "no empty part"),
        (tensor("x" * 2000, (64, 32), "Q4_0", 0), "a name of 2000 characters"),
        (tensor("blk.0.attn_k.weight", (64, 32), "Q4_0", 0), "tensor blk.0.attn_k.weight is duplicated"),
        (tensor("blk.00.attn_k.weight", (64, 32), "Q4_0", 0), "found 64 rows|is there twice, under another name too"),
        (
            tensor("blk.0.attn_sinks.weight", (64, 32), "Q4_0", 0),
            "unsupported: .*attn_sinks.weight is none of",
        ),
        (tensor("blk.1.attn_q.weight", (64, 32), "Q4_0", 0), "unsupported: .*blk.1.attn_q.weight is none of"),
        (tensor("blk.0.ffn_up_exps.weight", (64, 32), "Q4_0", 0), "unsupported: .*ffn_up_exps.weight is none of"),
        (tensor("blk.0.attn_v.weight", (4, 16, 32), "Q4_0", 0), r"unsupported: .*v_proj.weight is Q4_0 \[4, 16, 32\]"),
        (tensor("blk.0.attn_v.bias", (64, 32), "Q4_0", 0), "unsupported: .*v_proj.bias is Q4_0"),
    ],
)
def test_tensor_tables(tmp_path: Path, first: bytes, match: str) -> None:
    path = written(tmp_path / "m.gguf", tensors=[first, TENSORS[1]])
    refused(lambda: open_checkpoint(path), match)


def test_experts_that_are_no_stack(tmp_path: Path) -> None:
    facts = FACTS | {"llama.expert_count": 2, "llama.expert_used_count": 1}
    path = written(tmp_path / "m.gguf", facts, [tensor("blk.0.ffn_up_exps.weight", (64, 32), "Q4_0", 0), TENSORS[1]])
    refused(lambda: open_checkpoint(path), r"ffn_up_exps.weight: expected \[experts, rows, columns\], found \[64, 32\]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_are_checked(tmp_path: Path, bad: float) -> None:
    path = written(tmp_path / "m.gguf", data=DATA[:180] + struct.pack("<e", bad) + DATA[182:])
    refused(lambda: open_checkpoint(path).stored(Q), r"q_proj\.weight: expected finite scales, found . NaN, . Inf")
    biased = [*TENSORS, tensor("blk.0.attn_q.bias", (64,), "F32", 1728)]
    path = written(tmp_path / "b.gguf", tensors=biased, data=DATA + struct.pack("<64f", bad, *[0.0] * 63))
    refused(lambda: open_checkpoint(path).stored(Q), "q_proj.bias: expected finite values")
    biased = [*TENSORS, tensor("blk.0.attn_q.bias", (32,), "F32", 1728)]
    path = written(tmp_path / "c.gguf", tensors=biased, data=DATA + bytes(128))
    refused(lambda: open_checkpoint(path), "expected rows of 4 heads of 16 .*, found 32 rows")


def test_codes_that_no_ternary_type_has(tmp_path: Path) -> None:
    block = bytes([0b11]) + bytes(63) + struct.pack("<e", 1.0)
    path = written(
        tmp_path / "m.gguf", {"general.architecture": "x"}, [tensor("fc.weight", (1, 256), "TQ2_0", 0)], block
    )
    refused(lambda: open_checkpoint(path).stored("fc"), "fc.weight: expected TQ2_0 codes 0 to 2, found 1 codes of 3")
    block = bytes([255]) + bytes(16)
    path = written(
        tmp_path / "n.gguf", {"general.architecture": "x"}, [tensor("fc.weight", (1, 32), "MXFP4", 0)], block
    )
    refused(lambda: open_checkpoint(path).stored("fc"), "exponents below 255")


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    ckpt = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1200])
    refused(lambda: ckpt.stored(Q), "the file was cut since the checkpoint was opened")
    path.unlink()
    refused(lambda: ckpt.stored(Q), "cannot be read: No such file")


def test_flipped_bits_and_cuts_of_the_header(tmp_path: Path) -> None:
    """Refused, or the module is there with its own numbers: never others, whatever the header claims."""
    path = written(tmp_path / "m.gguf")
    raw, right = path.read_bytes(), open_checkpoint(path).stored(Q)
    length, seen = len(raw) - len(DATA), {"refused": 0, "same": 0}
    flips = [raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :] for i in range(length)]
    for changed in [*flips, *(raw[:size] for size in range(0, len(raw), 97))]:
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)
                ckpt = open_checkpoint(path)
                ckpt.summary()
                assert torch.equal(ckpt.stored(Q), right)
            seen["same"] += 1
        except QhalError as bad:
            assert 20 < len(str(bad)) < 6000
            seen["refused"] += 1
    assert seen["refused"] > 300 and seen["same"] > 20, seen


def test_numbers_of_the_header_take_no_memory(tmp_path: Path) -> None:
    """A length, a count or a shape that the file does not have is refused before anything of its size is made."""
    huge: list[dict[str, Any]] = [
        {"counts": (1 << 60, 7)},
        {"counts": (2, 1 << 60)},
        {"facts": {**FACTS, "x": struct.pack("<IIQ", 9, 8, 1 << 62)}},
        {"facts": {**FACTS, "x": struct.pack("<IIQ", 9, 10, 1 << 60)}},
        {"facts": {**FACTS, "x": struct.pack("<IQ", 8, (1 << 24) - 1)}},
        {"tensors": [tensor("blk.0.attn_v.weight", (1 << 40, 32), "Q4_0", 0), *TENSORS[1:]]},
    ]
    tracemalloc.start()
    for change in huge:
        path = written(tmp_path / "m.gguf", **change)
        refused(lambda path=path: open_checkpoint(path), r"m\.gguf")  # type: ignore[misc]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
