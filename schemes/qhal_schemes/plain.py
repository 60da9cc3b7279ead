"""Plain modules: unquantized Linear layers, and the named rules by which a method leaves modules unquantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal_schemes.base import SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.matching import Patterns, is_router
from qhal_schemes.modules import ModuleTable
from qhal_schemes.source import WIDE, TensorIndex

ELEMENT_OF = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "e4m3fn", "F8_E8M0": "e8m0", "U8": "e8m0"}
"""Element names of planes by the dtype names of safetensors headers (a U8 scale holds E8M0 exponents)."""

_FIRST_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def describe_plain(index: TensorIndex, module: str) -> LinearFormat:
    """The format of an unquantized Linear module."""
    weight = index.expect(f"{module}.weight", tuple(WIDE), (None, None))
    bias = f"{module}.bias" in index
    if bias:
        index.expect(f"{module}.bias", tuple(WIDE), (weight.shape[0],))
    return LinearFormat(module, weight.shape[0], weight.shape[1], Format(ELEMENT_OF[weight.dtype]), bias=bias)


def read_plain(index: TensorIndex, module: str) -> LinearSpec:
    """The spec of an unquantized Linear module."""
    f = describe_plain(index, module)
    t = index.read_all([f"{module}.weight", *([f"{module}.bias"] if f.bias else [])])
    return LinearSpec(t[f"{module}.weight"], bias=t[f"{module}.bias"].float() if f.bias else None, name=module)


class PlainMapping(SchemeMapping):
    """A checkpoint without a quantization section: every Linear module is plain."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._excluded = dict.fromkeys(ModuleTable(index).plain_linears(), "the checkpoint is not quantized")

    @property
    def modules(self) -> Sequence[str]:
        """None."""
        return ()

    @property
    def excluded(self) -> Mapping[str, str]:
        """Every Linear module."""
        return self._excluded

    def describe(self, module: str) -> LinearFormat:
        """Not called: no module is quantized."""
        raise CheckpointError(f"{module} is not quantized")

    def read(self, module: str) -> LinearSpec:
        """Not called: no module is quantized."""
        raise CheckpointError(f"{module} is not quantized")

    def tensors(self, module: str) -> Sequence[str]:
        """Not called: no module is quantized."""
        return ()


class BlockRules:
    """Rules of methods that quantize the Linear layers of a model's decoder blocks (AWQ, GPTQ) and say no more.

    A plain module is excluded by an entry of the configuration, as a router, or because it lies outside the blocks in
    which the file holds quantized modules (heads, other towers). A plain module inside them is an error.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        quantized: Collection[str],
        skipped: Patterns,
        rule: Callable[[str], str | None] = lambda module: None,
        last: Callable[[str], str | None] = lambda module: None,
    ) -> None:
        """rule, last: why a method keeps a module plain, asked after the configuration's list, and at the very end."""
        self.config, self.skipped, self.rule, self.last = config, skipped, rule, last
        for module in quantized:
            entry = skipped.find(module)
            if entry is not None:
                raise CheckpointError(
                    f"{config.folder}: {module} is excluded by {skipped.what} {entry!r}, "
                    f"but the file holds it quantized"
                )
        self.blocks = {_block(m) for m in quantized if _FIRST_NUMBER.search(m)}
        within = config.quantization.get("modules_in_block_to_quantize")
        if within is not None and not isinstance(within, list):
            raise config.bad("modules_in_block_to_quantize", "a list of module names", within)
        flat = [n for entry in within or [] for n in (entry if isinstance(entry, list) else [entry])]
        self.within = tuple(str(n) for n in flat)

    def exclude(self, plain: Iterable[str]) -> dict[str, str]:
        """module -> rule for every plain Linear module."""
        return {module: self._why(module) for module in plain}

    def _why(self, module: str) -> str:
        entry = self.skipped.find(module)
        if entry is not None:
            return f"{self.skipped.what} {entry!r}"
        named = self.rule(module)
        if named is not None:
            return named
        if not _FIRST_NUMBER.search(module) or _block(module) not in self.blocks:
            return f"outside the quantized blocks {', '.join(sorted(self.blocks))}"
        if is_router(module):
            return "a router is not quantized by this method"
        if self.within and not any(f".{module}".endswith(f".{n}") for n in self.within):
            return "not in modules_in_block_to_quantize"
        named = self.last(module)
        if named is not None:
            return named
        raise CheckpointError(
            f"{self.config.folder}: {module}: the configuration quantizes every Linear layer of its block, "
            f"but the file holds a plain weight and no rule excludes it{self.skipped.partial(module)}"
        )


def _block(module: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `model.layers.*`."""
    found = _FIRST_NUMBER.search(module)
    return f"{module[: found.start()]}.*" if found else module
