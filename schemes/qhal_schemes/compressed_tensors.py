"""compressed-tensors: config groups matched to modules, and every matched module read into a LinearSpec.

The file decides what a module holds, the configuration what it should hold; where they disagree it is an error that
names the module and the rule. Tensors and decoding: `ct_weights.py`; keys: `ct_config.py`; rotations: `transforms.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks, ct_weights
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.ct_config import FORMATS, Arguments, Group, input_format, read_groups
from qhal_schemes.ct_kv import CacheScheme
from qhal_schemes.ct_weights import Stored
from qhal_schemes.evidence import Family
from qhal_schemes.matching import EMBEDDING, Patterns, is_router, module_class, near_text
from qhal_schemes.modules import ModuleTable, is_plain
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex
from qhal_schemes.transforms import Online, Transforms

_CODES = (
    "weight_packed",
    "weight_scale",
    "compressed",
    "bitmask",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
)


@dataclass(frozen=True)
class _Module:
    """One module: its group (None: a plain weight that only a rotation acts on), its tensors and its rotations."""

    group: Group | None
    stored: Stored
    before: tuple[Online, ...]
    after: tuple[Online, ...]
    bias: bool


class CompressedTensorsMapping(SchemeMapping):
    """A compressed-tensors checkpoint."""

    cache: CacheScheme | None

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._groups = read_groups(config)
        version = config.quantization.get("version")
        if version is not None and not isinstance(version, str):
            raise config.bad("version", "the version of compressed-tensors, a text", version)
        self._version = version or ""
        self._transforms = Transforms.read(config, index)
        self.cache = CacheScheme.read(config, index)
        self._sparse = _sparsity(config)
        self._modules: dict[str, _Module] = {}
        self._excluded: dict[str, str] = {}
        self._match(ModuleTable(index))
        self._transforms.finish()

    @property
    def modules(self) -> Sequence[str]:
        """Modules that a config group quantizes, or that an online transform acts on."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain Linear modules: ignored, or targeted by no group."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The file format of its group, and the older packing of 3-, 5-, 6- and 7-bit codes."""
        m = self._modules[module]
        if m.group is None:
            return "float"
        return self._sparse or m.group.format + (
            ", whole codes in words" if m.stored.aligned and 32 % m.group.weights.bits else ""
        )

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, zero points, shapes, input scales, rotations and a bias."""
        m = self._modules[module]
        names = [*m.stored.names, *(name for name, _ in self._input_names(module, m.group))]
        names += [name for one in (*m.before, *m.after) for name in one.names]
        return [*names, f"{module}.bias"] if m.bias else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from the configuration and the index."""
        m = self._modules[module]
        a = m.group.inputs if m.group is not None else None
        return LinearFormat(
            name=module,
            n=m.stored.n,
            k=m.stored.k,
            weight=m.stored.format,
            input=None if a is None else self._input_format(module, a),
            static_input=a is not None and a.dynamic in (False, "local"),
            rotate_in=tuple(one.described for one in m.before),
            rotate_out=tuple(one.described for one in m.after),
            bias=m.bias,
            group_index=m.stored.group_index,
        )

    def read(self, module: str) -> LinearSpec:
        """Read and check one module."""
        m = self._modules[module]
        inputs = [name for name, _ in self._input_names(module, m.group)]
        t = self.index.read_all([*m.stored.names, *inputs, *([f"{module}.bias"] if m.bias else [])])
        after = tuple(one.rotation(self.index) for one in m.after)
        bias = t[f"{module}.bias"] if m.bias else None
        if bias is not None:
            checks.finite(self.index, f"{module}.bias", bias)
            total = bias.double()
            for rotation in after:  # the file's bias is added before the output transform, a spec's after it
                total = total @ rotation.matrix(m.stored.n)
            bias = total.float()
        weight: QTensor | Tensor = t[f"{module}.weight"] if m.group is None else self._weight(module, m.group, t)
        return LinearSpec(
            weight=weight,
            input=self._operand(module, m.group, t),
            rotate_in=tuple(one.rotation(self.index) for one in m.before),
            rotate_out=after,
            bias=bias,
            name=module,
        )

    def _weight(self, module: str, group: Group, t: dict[str, Tensor]) -> QTensor:
        stored = self._modules[module].stored
        return ct_weights.read(self.index, module, group, stored, {name: t[name] for name in stored.names})

    # ---------------------------------------------------------------- matching

    def _match(self, table: ModuleTable) -> None:
        quantized = {m for m in table.having(_CODES) if m not in set(self.kv_layers.values())}
        quantized |= {m for m, t in table.items() if "weight" in t and t["weight"].dtype in ("I8", "F8_E4M3")}
        linears = [m for m in table if m in quantized or (is_plain(table[m]) and not self._transforms.is_matrix(m))]
        ignore = Patterns("ignore", self.config.names("ignore"))
        targets = [(g, Patterns(f"config_groups.{g.name}.targets", g.targets)) for g in self._groups]
        claims = {
            m: [(g, found) for g, p in targets if (found := p.find(m, module_class(m))) is not None] for m in linears
        }
        for group, patterns in targets:
            self._check_targets(group, patterns, linears)
        for module in linears:
            kind = module_class(module)
            ignored = ignore.find(module, kind)
            if module in quantized:
                self._claim(module, kind, ignored, claims[module])
            elif kind != EMBEDDING:
                self._excluded[module] = self._why(module, ignore, ignored, claims[module])
                self._rotate_plain(module)
        if self.config.tied:  # the output head shares the embedding: the file has none, but may ignore it
            for name in ("lm_head", "model.lm_head", "language_model.lm_head"):
                ignore.find(name)
        ignore.warn_unused(linears)

    def _check_targets(self, group: Group, patterns: Patterns, linears: Sequence[str]) -> None:
        if not patterns.used:
            near = "".join(near_text(p, linears) for p in group.targets[:3])
            raise CheckpointError(
                f"{self.config.folder / self.config.file}: config_groups.{group.name}: targets "
                f"{', '.join(map(repr, group.targets))} match no module{near}"
            )
        patterns.warn_unused(linears)

    def _claim(self, module: str, kind: str, ignored: str | None, claims: list[tuple[Group, str]]) -> None:
        where = f"{self.index.folder}: {module}"
        if ignored is not None:
            raise CheckpointError(f"{where}: ignored by {ignored!r}, but the file holds quantized tensors of it")
        if not claims:
            raise CheckpointError(f"{where}: holds quantized tensors, but no target of any config group matches it")
        if len(claims) > 1:
            both = " and ".join(f"{g.name} ({found!r})" for g, found in claims)
            raise CheckpointError(f"{where}: claimed by two config groups, {both}; targets must not overlap")
        if kind == EMBEDDING:
            raise CheckpointError(f"unsupported: {where}: a quantized embedding; planned")
        group = claims[0][0]
        sparse = f"{module}.compressed" in self.index
        if sparse and self._sparse is None:
            raise CheckpointError(f"{where}: holds sparse tensors, but sparsity_config names no sparse-24-bitmask")
        stored = ct_weights.locate(self.index, module, group, self._version, sparse)
        a = group.inputs
        if a is not None and a.group_size > 0 and stored.k % a.group_size:
            path = f"config_groups.{group.name}.input_activations.group_size"
            raise self.config.bad(path, f"a divisor of the {stored.k} columns (K) of {module}", a.group_size)
        for name, dtypes in self._input_names(module, group):
            scalar = name in self.index and self.index[name].shape == ()
            self.index.expect(name, dtypes, () if scalar else (1,))
        self._modules[module] = self._module(module, group, stored)

    def _module(self, module: str, group: Group | None, stored: Stored) -> _Module:
        bias = f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (stored.n,))
        return _Module(group, stored, *self._transforms.of(module, stored.n, stored.k), bias)

    def _rotate_plain(self, module: str) -> None:
        """A plain weight that an online transform acts on is no plain module: its layer needs the rotation."""
        n, k = self.index[f"{module}.weight"].shape
        dtype = ELEMENT_OF[self.index[f"{module}.weight"].dtype]
        one = self._module(module, None, Stored(n, k, Format(dtype), (f"{module}.weight",)))
        if one.before or one.after:
            del self._excluded[module]
            self._modules[module] = one

    def _why(self, module: str, ignore: Patterns, ignored: str | None, claims: list[tuple[Group, str]]) -> str:
        if ignored is not None:
            return f"ignore {ignored!r}"
        if not claims:
            return "no target of any config group matches it"
        if is_router(module):
            return "a router with a class of its own is no Linear"
        group, found = claims[0]
        raise CheckpointError(
            f"{self.index.folder}: {module}: target {found!r} of {group.name} quantizes it, but the file holds a plain "
            f"weight and no ignore entry is its whole name or a `re:` pattern that matches it{ignore.partial(module)}"
        )

    # ---------------------------------------------------------------- inputs

    def _input_names(self, module: str, group: Group | None) -> list[tuple[str, tuple[str, ...]]]:
        """Tensors of a static input and the dtypes they may have."""
        a = group.inputs if group is not None else None
        if a is None or a.dynamic is True:
            return []
        if a.strategy == "tensor_group":
            return [(f"{module}.input_global_scale", ("F32",))]
        names: list[tuple[str, tuple[str, ...]]] = [(f"{module}.input_scale", tuple(WIDE))]
        zero = f"{module}.input_zero_point"
        if not a.symmetric or zero in self.index:  # old versions store a zero point of 0 for symmetric inputs too
            names.append((zero, ("I8",) if not a.symmetric else ("I8", "F8_E4M3", *WIDE)))
        return names

    def _input_format(self, module: str, a: Arguments) -> Format:
        if a.dynamic is False:
            return input_format(a, ELEMENT_OF[self.index[f"{module}.input_scale"].dtype])
        return input_format(a, dtype_name(self.config.dtype))

    def _operand(self, module: str, group: Group | None, t: dict[str, Tensor]) -> Operand | None:
        a = group.inputs if group is not None else None
        if a is None:
            return None
        fmt = self._input_format(module, a)
        if a.dynamic is True:
            return Operand(fmt)
        name = f"{module}.{'input_global_scale' if a.strategy == 'tensor_group' else 'input_scale'}"
        checks.scales(self.index, name, t[name], positive=True)
        zero = t.get(f"{module}.input_zero_point")
        if zero is not None and a.symmetric:
            if bool(zero.float().ne(0).any()):
                raise self.index.bad(f"{module}.input_zero_point", "0, as symmetric is true", str(zero.tolist()))
            zero = None
        return Operand(fmt, t[name].reshape(1), None if zero is None else zero.reshape(1))


def _sparsity(config: CheckpointConfig) -> str | None:
    """The format of sparsity_config that needs decoding, None if values are stored densely."""
    section = config.quantization.get("sparsity_config") or {}
    if not isinstance(section, dict):
        raise config.bad("sparsity_config", "an object", section)
    name = section.get("format")
    if name in (None, "dense"):
        return None
    if name != "sparse-24-bitmask":
        raise CheckpointError(
            f"unsupported: {config.folder / config.file}: sparsity_config.format {str(name)[:80]!r}; "
            f"sparse-24-bitmask and dense can be read, others are planned"
        )
    return str(name)


scheme = MappingScheme(
    CompressedTensorsMapping,
    Family(
        "compressed-tensors",
        "llm-compressor, compressed-tensors 0.13 to 0.20",
        (*FORMATS, "sparse-24-bitmask", "float"),
        (
            "quantized outputs, groups that quantize inputs only",
            "quantized embeddings",
            "Marlin layouts and other formats: device layouts are made by backends",
            "caches other than static fp8 or int8 per tensor or head and dynamic 8 bit per token",
            "online transforms at places that no Linear module has",
        ),
    ),
)
