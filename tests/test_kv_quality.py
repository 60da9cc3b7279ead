"""The table and the picture of `make kv-quality`, from numbers that are made up here; sizes from the real planes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "kv_quality"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    for name in ("kv_quality", "chart", "fetch", "gguf_file", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import kv_quality

    return kv_quality


def test_the_chart_is_svg_with_every_format_in_order(example: ModuleType) -> None:
    points = [("int4,bf16", 10.0, 42.5), ("fp8<row>", 8.5, 0.01), ("int8", 8.25, -0.1)]
    root = ElementTree.fromstring(example.chart(points, "bf16", 26.3))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    names = [t for t in texts if t in {p[0] for p in points}]
    assert names == ["int8", "fp8<row>", "int4,bf16"]
    assert {"-0.10 %", "+42.50 %", "0.01 %", "100 %", "8.25"} <= set(texts)
    dots = [float(c.attrib["cx"]) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert dots[0] == dots[1] < dots[2] <= 860  # both small ones stand at the left end
    assert "prefers-color-scheme: dark" in example.chart(points, "bf16", 26.3)


def test_the_table_says_what_was_measured(example: ModuleType, tmp_path: Path) -> None:
    rows = [
        example.Row("bf16", "bf16", "bf16", "", 16.0, 23040, 26.0, 0.0, 1.0),
        example.Row("fp8", "e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32", "1", 8.0, 11520, 26.26, 0.26, 1.0),
    ]
    facts = {"model": "m", "text": "t", "windows": 6, "tokens": 3066, "backend": "b", "level": "L2", "commit": "c0ffee"}
    example.write({**facts, "transformers_perplexity": 25.9}, rows, tmp_path / "out")
    text = (tmp_path / "out" / "kv-formats.md").read_text()
    for part in ("3066 predictions", "level L2, commit c0ffee", "25.900", "| 11520 | 26.260 | +0.260 (+1.00%) |"):
        assert part in text
    ElementTree.parse(tmp_path / "out" / "kv-formats.svg")


def test_bits_and_bytes_count_codes_and_paged_scales(example: ModuleType) -> None:
    from qhal_engines.kv_plan import AttentionLayer, CacheLayer

    attention = AttentionLayer("a", 0, 9, 3, 64, 64, 0.125)
    for word, bits in (
        ("bf16", 16),
        ("fp8", 8),
        ("int8", 8.5),
        ("int4.g32*fp16", 4.5),
        ("nvfp4", 4.5),
        ("bf16,int4", 10.25),
    ):
        k, v = example.parse_kv(word)
        cache = CacheLayer(attention, example.KVFormat("mha", k, v, heads=3, k_dim=64, v_dim=64))
        assert example.sizes([cache] * 30) == (bits, 30 * 3 * 128 * bits / 8)
