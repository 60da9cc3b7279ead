"""Which fused operators an attention takes: the lines of the table whose demands the request keeps, or why none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from qhal.elements import WIDE
from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass, minimum_class
from qhal_npu import attention_table as table
from qhal_npu.attention_table import FusedAttention

HALVES = ("bf16", "fp16")


@dataclass(frozen=True)
class Fused:
    """Lines of the table that serve a request, in order: the first that takes a batch runs it. note: why not others."""

    lines: tuple[FusedAttention, ...]
    numerics: NumericsClass
    note: str = ""


@dataclass(frozen=True)
class Broken:
    """A demand that a request breaks, of every line that could serve it: `note` has the others."""

    demand: str
    found: str
    note: str = ""

    def __str__(self) -> str:
        return self.note or f"{self.found} [{self.demand}: {table.DEMANDS[self.demand]}]"


@lru_cache(maxsize=4096)
def choose(r: AttentionRequest, arch: str) -> Fused | Broken:
    """The lines that serve a well-formed request, or what every line asks that it breaks."""
    general = next(_types(r), None)
    if general is not None:
        return general
    lines: list[FusedAttention] = []
    passed: list[str] = []
    broken = Broken("latent-queries", f"phase {r.phase}")
    for line in table.FUSED:
        if line.kv != r.kv.kind or r.phase not in line.phases or not _reads(r, line):
            continue
        found = next(_broken(r, line, arch), None)
        if found is None:
            lines.append(line)
        else:
            passed.append(f"not {line.kind}: {found}")
            broken = found
    if not lines:
        return replace(broken, note="; ".join(passed))
    numerics = NumericsClass.REDUCED_ACC if _plain_cache(r) else NumericsClass.DEQUANT_16
    assert numerics <= minimum_class(r)
    return Fused(tuple(lines), numerics, "; ".join(passed))


def _plain_cache(r: AttentionRequest) -> bool:
    return r.kv.k.plain and r.kv.v.plain


def _reads(r: AttentionRequest, line: FusedAttention) -> bool:
    """Whether the cache has what a line reads."""
    if line.rows == "int8 pages":
        return all(_codes(f) and f.block is not None and f.block.kind in line.blocks for f in (r.kv.k, r.kv.v))
    return line.rows == "gathered" or _plain_cache(r)


def _types(r: AttentionRequest) -> Iterator[Broken]:
    """What no line of the table takes."""
    if not r.q.plain or not (r.q_rope or r.q).plain:
        yield Broken("quantized-queries", f"q={r.q}")
    kind = r.q.element
    others = [f for f in (r.p, r.q_rope or r.q, r.kv.k, r.kv.v) if f.plain and f.element != kind]
    if not r.p.plain or kind not in HALVES or others:
        yield Broken("attention-types", f"q={r.q}, p={r.p}, k={r.kv.k}, v={r.kv.v}")
    elif r.out != WIDE[kind]:
        yield Broken("attention-types", f"q={r.q}, out={r.out}")
    if r.softcap is not None or r.tree:
        yield Broken("attention-options", "a soft cap" if r.softcap is not None else "a tree")
    if r.heads > 256 or r.heads > 64 * r.kv.heads * (2 if r.kv.kind == "mla" else 1):
        yield Broken("head-count", f"{r.heads} heads over {r.kv.heads}")


def _broken(r: AttentionRequest, line: FusedAttention, arch: str) -> Iterator[Broken]:
    """Every demand of a line that a request breaks."""
    if arch not in line.on:
        yield Broken("attention-generation", f"{line.op} over {line.rows}: {', '.join(line.on)}, this is {arch}")
    yield from _options(r, line)
    if line.rows == "int8 pages":
        yield from _antiquant(r, line)
    if line.kv == "mla":
        yield from _latent(r, line)
    else:
        yield from _dims(r, line)


def _options(r: AttentionRequest, line: FusedAttention) -> Iterator[Broken]:
    asked = {"window": r.window is not None, "sinks": r.sinks, "full": not r.causal and r.phase != "decode"}
    for name in (name for name, on in asked.items() if on and name not in line.options):
        yield Broken("attention-options", name)
    if r.lse and "lse" not in line.options:
        yield Broken("latent-lse", "lse")
    if r.lse and r.sinks:
        yield Broken("sink-lse", "lse and sinks")
    if r.sinks and r.kv.v_dim > 128:
        yield Broken("sink-width", f"values of {r.kv.v_dim}")


def _dims(r: AttentionRequest, line: FusedAttention) -> Iterator[Broken]:
    k, v, page = r.kv.k_dim, r.kv.v_dim, r.kv.page
    if line.layout == "TND":
        if r.q.element != "bf16":
            yield Broken("tnd-type", f"q={r.q}")
        if width(k, v) is None:
            yield Broken("tnd-width", f"D {k}, {v}")
        return
    unit = 32 if line.rows == "int8 pages" else 16
    if k != v or k % unit or k > 512:
        yield Broken("head-dims", f"D {k}, {v}")
    if max(r.kv.heads, r.heads if line.layout == "BSND" else 0) * k > table.ROW_LIMIT:
        yield Broken("row-width", f"{r.kv.heads} key-value heads, {r.heads} heads of {k}")
    if line.rows != "gathered" and line.phases == ("decode",) and (page % unit or page > 512):
        yield Broken("decode-page", f"pages of {page}")
    if line.rows == "pages" and line.phases == ("prefill",) and (page % 128 or page > 512):
        yield Broken("prefill-page", f"pages of {page}")


def width(k: int, v: int) -> tuple[int, int] | None:
    """D of keys and of values that TND takes, at least as wide; None if there is none."""
    return next((pair for pair in table.TND_WIDTHS if k <= pair[0] and v <= pair[1]), None)


def _antiquant(r: AttentionRequest, line: FusedAttention) -> Iterator[Broken]:
    k, v = r.kv.k, r.kv.v
    assert k.block is not None and v.block is not None
    if (k.block.kind, k.zero is None) != (v.block.kind, v.zero is None):
        yield Broken("antiquant-pair", f"k={k}, v={v}")


def _codes(f: Format) -> bool:
    """int8 codes, (code - zero) * scale."""
    plain = all(part is None or part.plain for part in (f.scale, f.zero))
    return f.element == "int8" and f.scale is not None and f.op == "*" and f.offset is None and plain


def _latent(r: AttentionRequest, line: FusedAttention) -> Iterator[Broken]:
    if (r.kv.k_dim, r.kv.v_dim) != (table.LATENT, table.ROPE) or r.heads not in table.LATENT_HEADS:
        yield Broken("latent-sizes", f"rows of {r.kv.k_dim} and {r.kv.v_dim}, {r.heads} heads")
    if line.rows == "pages" and r.kv.page not in table.LATENT_PAGES:
        yield Broken("latent-page", f"pages of {r.kv.page}")
