"""ModelSlim: every tensor's quantization type is written in quant_model_description.json, config.json says nothing.

The description (`ms_description.py`) is matched with the files, types (`ms_types.py`) with tensors (`ms_weights.py`,
`ms_static.py`), and what is wrapped around a Linear module (`ms_wrappers.py`) becomes its rotations, branch and clip.
Layouts were checked against files of both writers of msmodelslim 26.1.0; what was compared with their numbers:
compared/modelslim.txt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand, Weight
from qhal_schemes import checks, ms_static, ms_weights, ms_wrappers
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.matching import EMBEDDING, LINEAR, module_class
from qhal_schemes.modules import ModuleTable, is_plain
from qhal_schemes.ms_cache import Caches
from qhal_schemes.ms_description import Description
from qhal_schemes.ms_types import KINDS, PLAIN, REFUSED, STATIC, Kind, Type, parse
from qhal_schemes.ms_weights import Stored
from qhal_schemes.ms_wrappers import Wrappers
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex

_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})


@dataclass(frozen=True)
class _Module:
    """One module. kind: None for plain floats that something is wrapped around."""

    kind: Kind | None
    stored: Stored
    wrappers: Wrappers
    names: tuple[str, ...]
    bias: bool


class ModelSlimMapping(SchemeMapping):
    """A ModelSlim checkpoint."""

    cache: Caches

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._description = Description.read(config, index)
        self._where = f"{config.folder / config.file}"
        self._types = {name: parse(t, f"{self._where}: {name}") for name, t in self._description.types.items()
                       if name.endswith(".weight")}  # fmt: skip
        self._mixed = any(t.kind is not None and t.kind.mx for t in self._types.values())
        self._modules: dict[str, _Module] = {}
        self._excluded: dict[str, str] = {}
        self._match(ModuleTable(index))
        self.cache = Caches(config, index, self._description)
        self._warn_about_the_model()

    @property
    def modules(self) -> Sequence[str]:
        """Modules with a quantized weight, or with something wrapped around a plain one."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain Linear modules: their type is FLOAT (or W16A16S)."""
        return self._excluded

    def layout(self, module: str) -> str:
        """Its type, and the axis on which codes are paired."""
        m = self._modules[module]
        pairs = "" if m.stored.pairs is None else ", pairs of columns" if m.stored.pairs else ", pairs of rows"
        return self._types[f"{m.wrappers.stem}.weight"].name + pairs

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, offsets, static inputs, redundant planes, wrappers and a bias."""
        m = self._modules[module]
        return (*m.names, *m.wrappers.names)

    def describe(self, module: str) -> LinearFormat:
        """The format, from the description and the index."""
        m = self._modules[module]
        fmt = self._input_format(m)
        return LinearFormat(
            name=module,
            n=m.stored.n,
            k=m.stored.k,
            weight=m.stored.format,
            input=fmt,
            static_input=m.kind is not None and m.kind.static == "always",
            decode_input=Format.parse(STATIC) if m.kind is not None and m.kind.static == "decode" else None,
            static_decode=m.kind is not None and m.kind.static == "decode",
            clip=bool(m.wrappers.clip),
            rotate_in=m.wrappers.kinds,
            low_rank=m.wrappers.low_rank,
            bias=m.bias,
        )

    def read(self, module: str) -> LinearSpec:
        """Read and check one module."""
        m = self._modules[module]
        stem, index = m.wrappers.stem, self.index
        t = {name.rpartition(".")[2]: value for name, value in index.read_all(m.names).items()}
        if "bias" in t:
            checks.finite(index, f"{stem}.bias", t["bias"])
        bias = t["bias"].float() if "bias" in t else None
        weight: Weight = t["weight"]
        fmt, static = self._input_format(m), None
        if m.kind is not None:
            weight = ms_weights.read(index, stem, m.kind, m.stored, t)
        if m.kind is not None and m.kind.static:
            static = ms_static.operand(index, stem, t)
            folded = ms_static.folded_bias(index, stem, t, known=m.kind.static == "decode")
            bias = folded if m.kind.static == "always" else bias
        always = m.kind is not None and m.kind.static == "always"
        return LinearSpec(
            weight=weight,
            input=static if always else None if fmt is None else Operand(fmt, clip=m.wrappers.ratio(index)),
            decode_input=None if always else static,
            rotate_in=m.wrappers.rotations(index),
            low_rank=m.wrappers.branch(index),
            bias=bias,
            name=module,
        )

    # ---------------------------------------------------------------- matching

    def _match(self, table: ModuleTable) -> None:
        for stem, tensors in table.items():
            name = f"{stem}.weight"
            found = self._types.get(name)
            if found is None:
                continue
            module = ms_wrappers.smoothed(self.index, stem)
            if found.kind is not None and len(tensors["weight"].shape) == 1 and stem.endswith(".module"):
                continue  # a second copy of a norm, which the older writer gives the model's type
            if found.kind is not None:
                if module_class(module) == EMBEDDING:
                    raise CheckpointError(f"unsupported: {self.index.folder}: {module}: a quantized embedding; planned")
                self._modules[module] = self._quantized(stem, found, found.kind)
            elif is_plain(tensors) and module_class(module) == LINEAR:
                n, k = tensors["weight"].shape
                wrappers = ms_wrappers.locate(self.index, stem, n, k)
                if wrappers.names:
                    self._modules[module] = self._plain(stem, wrappers, n, k, tensors["weight"].dtype)
                else:
                    self._excluded[module] = f"{found.name} in {self.config.file}"
        if not self._modules:
            raise CheckpointError(f"{self._where}: no Linear module has another type than {' or '.join(PLAIN)}")

    def _quantized(self, stem: str, found: Type, kind: Kind) -> _Module:
        group_size = 0 if self._mixed else self._description.group_size  # MX types overwrite that of other groups
        stored = ms_weights.locate(self.index, stem, kind, self._description.packed, group_size)
        wrappers = ms_wrappers.locate(self.index, stem, stored.n, stored.k)
        turned = any(f"{stem}.{part}" in self.index for part in ms_wrappers.FLAT)
        if turned > found.flatquant or (found.flatquant and not (turned or wrappers.clip)):
            self._disagrees(stem, found, f"{stem}.{ms_wrappers.FLAT[0]}", turned)
        if (wrappers.low_rank > 0) != found.svd:
            self._disagrees(stem, found, f"{stem}.svd_lowrank_l1", wrappers.low_rank > 0)
        if wrappers.clip and (not kind.input or kind.mx or kind.dual):
            raise CheckpointError(
                f"unsupported: {self.index.folder}: {wrappers.clip}: a clip ratio of whole tokens with {found.name}, "
                f"whose inputs have no scale per token; planned"
            )
        names = stored.names
        if kind.static:
            names += ms_static.locate(self.index, stem, stored.n)
        self._same_type(stem, found, names)
        bias = f"{stem}.bias" in self.index
        if bias:
            self.index.expect(f"{stem}.bias", tuple(WIDE), (stored.n,))
            names += (f"{stem}.bias",)
        return _Module(kind, stored, wrappers, names, bias or kind.static == "always")

    def _plain(self, stem: str, wrappers: Wrappers, n: int, k: int, dtype: str) -> _Module:
        bias = f"{stem}.bias" in self.index
        names = (f"{stem}.weight", f"{stem}.bias") if bias else (f"{stem}.weight",)
        if bias:
            self.index.expect(f"{stem}.bias", tuple(WIDE), (n,))
        if wrappers.clip:
            raise CheckpointError(f"{self.index.folder}: {wrappers.clip}: a clip ratio, but {stem} has the type FLOAT")
        return _Module(None, Stored(n, k, Format(ELEMENT_OF[dtype]), names[:1]), wrappers, names, bias)

    def _input_format(self, m: _Module) -> Format | None:
        if m.kind is None:
            return None
        if m.kind.static == "always":
            return Format.parse(STATIC)
        if m.kind.dual:
            return ms_weights.dual_input(m.stored.format)
        if not m.kind.input:
            return None
        return Format.parse(f"{m.kind.input}@clip=range" if m.wrappers.clip else m.kind.input)

    def _same_type(self, stem: str, found: Type, names: Sequence[str]) -> None:
        """The description gives all tensors of a weight the weight's type."""
        for name in names:
            other = self._description.types[name]
            if other != found.name:
                raise CheckpointError(
                    f"{self._where}: {name} has the type {other[:80]!r}, but {stem}.weight has {found.name}"
                )

    def _disagrees(self, stem: str, found: Type, name: str, there: bool) -> None:
        state = "is there" if there else "is missing"
        raise CheckpointError(f"{self._where}: {stem}.weight has the type {found.name}, but {name} {state}")

    def _warn_about_the_model(self) -> None:
        """What Linear modules do not hold, and a model class that does not know it would leave out in silence.

        Outlier suppression gives RMSNorms a bias; a rotation that stands in a module's place is a square matrix.
        """
        read = {name for m in self._modules for name in self.tensors(m)}
        biases = [n for n in self.index if n.endswith(".bias") and n.split(".")[-2] in _NORMS]
        square = [n for n, e in self.index.items() if len(e.shape) == 2 and e.shape[0] == e.shape[1] > 1]
        turned = [n for n in square if not n.endswith(".weight") and n not in read]
        for names, what in (
            (biases if self.config.value("rms_norm_eps") is not None else [], "norms have a bias that must be added"),
            (turned, "matrices are no weight: rotations, which the model must apply to its activations"),
        ):
            if names:
                warnings.warn(
                    f"{self.index.folder}: {len(names)} {what} ({names[0]} ...); a model without them computes "
                    f"something else",
                    CheckpointWarning,
                    stacklevel=3,
                )


scheme = MappingScheme(
    ModelSlimMapping,
    Family(
        "ModelSlim",
        "msmodelslim 26.1, both of its writers",
        (*KINDS, "W4A4_FLATQUANT_DYNAMIC", "W4A4_MXFP4_SVD", "FLOAT"),
        (
            *(f"{name}: {why}" for name, why in REFUSED.items()),
            "quantized embeddings",
            "quantized latent attention",
            "clip ratios of inputs without a scale per token",
        ),
    ),
)
