"""QuIP#: points of the E8 lattice between two Hadamard transforms with signs.

`quip_params` in config.json names the codebook; a module has Qidxs int64, SU [K], SV [N] (the weight's scale is folded
in), Wscale 1, codebook_id, and with rescale_WH scaleWH [K]:

    y = SV * H_N( W ( H_K^T ( SU * x / scaleWH ) ) )

W, with entries of 8 columns each (`qhal.lattices`):
    E8P12       Qidxs [N, K/32]   e8p12[a]
    E8P12RVQ4B  Qidxs [N, K/16]   e8p12[a] + e8p12[b] / 3.45, two E8P12 halves side by side
    E8P12RVQ3B  Qidxs [N, 3K/64]  e8p12[a] + e81b[b] / 2.04, then b as eight bytes in a word
resid_scale_override takes the place of 3.45 and 2.04. Fused layers multiply the rows of part i by fuse_scales[i].

Source: A. Tseng et al., QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks (2024), and
the layout of files of QuIP# 1d8f873, with whose layers E8P12 and E8P12RVQ4B were compared. E8P12RVQ3B, scaleWH and
fuse_scales are from its description, not compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qhal.codebooks import CodebookFormat, CodebookSegment, CodebookTensor, SegmentFormat
from qhal.errors import CheckpointError, FormatError
from qhal.layer_formats import LinearFormat
from qhal.rotations import Diagonal, Hadamard, hadamard_for, kinds
from qhal.specs import LinearSpec
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.compiled import loops
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family, variants
from qhal_schemes.lanes import interleave, turn
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import WIDE, TensorIndex

_KEY = "quip_params"
_PARTS = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
_KEYS = frozenset({
    "codebook", "codebook_version", "codesz", "idx_dtype", "lora_rank", "outlier_channel_split", "packsz", "rescale_WH",
    "model_version", "resid_scale_override", "pack_out", "fused",
})  # fmt: skip
_FIXED: dict[str, tuple[object, ...]] = {
    "codebook_version": (1,), "codesz": (8,), "idx_dtype": ("torch.int64",), "lora_rank": (0,),
    "outlier_channel_split": (False,), "pack_out": (False,), "model_version": (1,),
}  # fmt: skip
"""Keys that would change what the tensors mean, and the values that can be read."""


class _Codebook(NamedTuple):
    """columns: int64 words of Qidxs for 64 columns of the weight; divisor: of the second stage."""

    id: int
    columns: int
    tables: tuple[str, ...]
    divisor: float


_CODEBOOKS = {
    "E8P12": _Codebook(7, 2, ("e8p12",), 1.0),
    "E8P12RVQ4B": _Codebook(17, 4, ("e8p12", "e8p12"), 3.45),
    "E8P12RVQ3B": _Codebook(18, 3, ("e8p12", "e81b"), 2.04),
}


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed | None:
    """config.json with quip_params."""
    section = model.get(_KEY)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"{files[0]}: {_KEY}: expected an object, found {type(section).__name__}")
    return Claimed("quip", section, files[0].name)


class QuIPMapping(SchemeMapping):
    """A QuIP# checkpoint: one codebook for all modules."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        section = config.quantization
        for key in (k for k in section if k not in _KEYS | {"quant_method"}):
            text = f"{config.folder / config.file}: {_KEY}.{key[:80]}: no key of QuIP# that is known here"
            warnings.warn(f"{text}; it is not looked at", CheckpointWarning, stacklevel=2)
        for key, allowed in _FIXED.items():
            value = section.get(key, allowed[0])
            if value not in allowed or type(value) is not type(allowed[0]):
                raise CheckpointError(f"unsupported: {config.bad(f'{_KEY}.{key}', f'{allowed[0]!r}', value)}")
        name = section.get("codebook")
        if not isinstance(name, str) or name not in _CODEBOOKS:
            raise config.bad(f"{_KEY}.codebook", f"one of {', '.join(_CODEBOOKS)}", name)
        self._name, self._book = name, _CODEBOOKS[name]
        packed = section.get("packsz", 8 / self._book.columns)
        if type(packed) not in (int, float) or not abs(packed - 8 / self._book.columns) < 0.01:
            raise config.bad(f"{_KEY}.packsz", f"{8 / self._book.columns:.4g}, as {name} has", packed)
        self._rescaled, self._fused = config.boolean("rescale_WH", False), config.boolean("fused", False)
        self._divisors = self._stage_divisors()
        table = ModuleTable(index)
        self._modules = table.having(_PARTS)
        if not self._modules:
            raise CheckpointError(f"{index.folder}: config.json has {_KEY}, but no module has Qidxs")
        rules = BlockRules(config, self._modules, PathPatterns(_KEY, ()))
        self._excluded = rules.exclude(table.plain_linears())

    @property
    def modules(self) -> Sequence[str]:
        """Modules with Qidxs."""
        return self._modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The codebook, and the scales that are not always there."""
        traits = ["scaleWH"] * self._rescaled + ["fuse_scales"] * self._split(module)
        return ", ".join([self._name, *traits])

    def tensors(self, module: str) -> Sequence[str]:
        """Qidxs, SU, SV, Wscale, codebook_id, and scaleWH, fuse_scales and a bias where the layer has them."""
        optional = [("scaleWH", self._rescaled), ("fuse_scales", self._split(module))]
        optional.append(("bias", f"{module}.bias" in self.index))
        return [f"{module}.{part}" for part in (*_PARTS, *(name for name, has in optional if has))]

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        wide, expect = tuple(WIDE), self.index.expect
        k = expect(f"{module}.SU", wide, (None,)).shape[0]
        n = expect(f"{module}.SV", wide, (None,)).shape[0]
        if n % 16 or k % 64 or not n or not k:
            raise self.index.bad(f"{module}.SU", "N in 16s and K in 64s, whole blocks of codes", f"N={n}, K={k}")
        expect(f"{module}.Qidxs", ("I64",), (n, k // 64 * self._book.columns))
        for part, dtype in (("Wscale", ("F32",)), ("codebook_id", ("I64",))):
            entry = self.index.entries.get(f"{module}.{part}")
            expect(f"{module}.{part}", dtype, () if entry is None or entry.shape == () else (1,))
        if self._rescaled:
            expect(f"{module}.scaleWH", wide, (k,))
        if self._split(module):
            expect(f"{module}.fuse_scales", wide, (None,))
        bias = f"{module}.bias" in self.index
        if bias:
            expect(f"{module}.bias", wide, (n,))
        tables = tuple((65536 if t == "e8p12" else 256, t) for t in self._book.tables)
        before, after = self._transforms(module, n, k)
        return LinearFormat(
            name=module,
            n=n,
            k=k,
            weight=CodebookFormat((SegmentFormat(k, (1, 8), tables, self._divisors),)),
            rotate_in=(("diagonal", k), before.kind),
            rotate_out=(after.kind, ("diagonal", n)),
            bias=bias,
        )

    def read(self, module: str) -> LinearSpec:
        """Unpack the codes; signs, scales and transforms become the chains around the product."""
        f = self.describe(module)
        t = {n.removeprefix(f"{module}."): v for n, v in self.index.read_all(self.tensors(module)).items()}
        if int(t["codebook_id"]) != self._book.id:
            raise self.index.bad(
                f"{module}.codebook_id", f"{self._book.id}, of the codebook in {_KEY}", f"{int(t['codebook_id'])}"
            )
        if float(t["Wscale"]) != 1:
            raise self.index.bad(f"{module}.Wscale", "1, as the scale is folded into SV", f"{float(t['Wscale'])}")
        for part in ("SU", "SV", "scaleWH", "fuse_scales"):
            if part in t:
                checks.scales(self.index, f"{module}.{part}", t[part])
        if f.bias:
            checks.finite(self.index, f"{module}.bias", t["bias"])
        signs, scales = t["SU"].float(), t["SV"].float()
        if self._rescaled:
            signs = signs / t["scaleWH"].float()
        if "fuse_scales" in t:
            scales = scales * self._rows(module, t["fuse_scales"].float(), f.n)
        before, after = self._transforms(module, f.n, f.k)
        segment = CodebookSegment(self._codes(t["Qidxs"], f.n, f.k), self._book.tables, self._divisors)
        spec = LinearSpec(
            CodebookTensor((f.n, f.k), (segment,)),
            rotate_in=(Diagonal(signs), before),
            rotate_out=(after, Diagonal(scales)),
            bias=t["bias"].float() if f.bias else None,
            name=module,
        )
        assert (kinds(spec.rotate_in), kinds(spec.rotate_out)) == (f.rotate_in, f.rotate_out)
        return spec

    def _codes(self, words: Tensor, n: int, k: int) -> Tensor:
        """int32 [N, K/8, stages]."""
        stages = words[:, : k // 32], words[:, k // 32 :]
        if self._book.tables[-1] == "e8p12":
            return unpack_e8p(stages[: len(self._book.tables)], n, k)
        return interleave([unpack_e8p(stages[:1], n, k)[..., 0], _bytes(stages[1])])

    def _transforms(self, module: str, n: int, k: int) -> tuple[Hadamard, Hadamard]:
        """H_K^T of the input and H_N of the output."""
        try:
            return hadamard_for(k, "quip").inverse(), hadamard_for(n, "quip")
        except FormatError as unknown:
            raise CheckpointError(f"unsupported: {self.index.folder}: {module}: {unknown}") from None

    def _split(self, module: str) -> bool:
        return self._fused and f"{module}.fuse_scales" in self.index

    def _rows(self, module: str, values: Tensor, n: int) -> Tensor:
        """fuse_scales by rows: q, k, v by the heads of config.json, or two equal halves."""
        if bool((values == values[0]).all()):
            return values[:1]
        config = self.config
        head, heads = config.head_dim, config.count("num_attention_heads") or 0
        sizes = [n // 2] * 2 if len(values) == 2 else [heads * head, config.kv_heads * head, config.kv_heads * head]
        if len(sizes) != len(values) or sum(sizes) != n:
            raise self.index.bad(
                f"{module}.fuse_scales", f"a scale for each of the parts {sizes} of {n} rows", f"{len(values)} scales"
            )
        return values.repeat_interleave(torch.tensor(sizes))

    def _stage_divisors(self) -> tuple[float, ...]:
        value = self.config.quantization.get("resid_scale_override", -1)
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            raise self.config.bad(f"{_KEY}.resid_scale_override", "a number, -1 for the codebook's own", value)
        if len(self._book.tables) == 1:
            return ()
        return (1.0, float(value) if value > 0 else self._book.divisor)


def unpack_e8p(stages: Sequence[Tensor], n: int, k: int) -> Tensor:
    """int32 codes [N, K/8, C] of e8p12 from C tensors int64 [N, K/32].

    A word holds codes of two rows and two columns, i = row + 2 * column: byte i is the upper byte of code i (which
    magnitudes), bit 32 + 4j + i is bit j of its lower byte (signs). Words stand in tiles of 8 rows and 4 columns.
    """
    compiled = loops("indices", *stages)
    if compiled is not None:
        return compiled.unpack_e8p(stages, n, k)  # type: ignore[no-any-return]
    return interleave([_e8p(words, n, k) for words in stages])


def _e8p(words: Tensor, n: int, k: int) -> Tensor:
    """int32 [N, K/8] with tensor operations."""
    tiles = words.reshape(n // 16, k // 64, 8, 4).transpose(1, 2).reshape(-1)
    signs, upper = (tiles >> 32).int(), tiles.int()
    for low, high, mask in _BIT_SWAPS:  # bit 4j + i to bit 8i + j: index bits j2 j1 j0 i1 i0 to i1 i0 j2 j1 j0
        shift = (1 << high) - (1 << low)
        swapped = (signs >> shift).bitwise_xor_(signs).bitwise_and_(mask)
        signs.bitwise_xor_(swapped).bitwise_xor_(swapped.bitwise_left_shift_(shift))
    codes = turn(torch.stack([signs, upper]).view(torch.uint8)).view(torch.int16)  # the lower byte first
    columns = codes.view(n // 2, k // 8, 2).int().bitwise_and_(0xFFFF)  # two rows side by side
    return turn(columns.view(torch.float32)).view(torch.int32).view(n, k // 8)


def _swap(low: int, high: int) -> tuple[int, int, int]:
    """Two bits of a bit's index that trade places, and which of 32 bits move up: those with `low` set, `high` clear."""
    mask = sum(1 << at for at in range(32) if at >> low & 1 and not at >> high & 1)
    return low, high, mask


_BIT_SWAPS = tuple(_swap(*pair) for pair in ((0, 1), (0, 2), (1, 3), (2, 4)))


def _bytes(words: Tensor) -> Tensor:
    """int32 [N, 8c] from int64 [N, c], the lowest byte first."""
    return torch.stack([(words >> (8 * i)) & 255 for i in range(8)], -1).flatten(1).int()


scheme = MappingScheme(
    QuIPMapping,
    Family(
        "QuIP#",
        "QuIP# 1d8f873",
        tuple(layout for name in _CODEBOOKS for layout in variants(name, "scaleWH", "fuse_scales")),
        (
            "codebooks other than " + ", ".join(_CODEBOOKS),
            "low-rank parts, split outlier channels, packed outputs",
            "sizes for which QuIP# has no Hadamard table",
        ),
    ),
)
