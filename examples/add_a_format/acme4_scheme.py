"""acme4: 4-bit codes, two to a byte, one fp16 step per group. No device in sight.

<module>.nibbles  uint8 [N, K/2], column 2j in the low half; a code is the value plus 8
<module>.steps    float16 [N, K/group_size]
config.json       {"quant_method": "acme4", "group_size": 32, "keep": ["lm_head"]}
W[n, k] = (code - 8) * step
"""

from collections.abc import Mapping, Sequence

import torch

from qhal import Format, LinearFormat, LinearSpec, QTensor
from qhal_schemes import CheckpointConfig, MappingScheme, SchemeMapping, TensorIndex, checks
from qhal_schemes.modules import ModuleTable


class Acme4(SchemeMapping):
    """`describe` looks at shapes only, `read` at one module's tensors; `.format` of the second equals the first."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._group = config.integer("group_size", default=32)  # a wrong value is one CheckpointError with its place
        keep, table = config.names("keep"), ModuleTable(index)
        self._modules = table.having(["nibbles"])
        self._excluded = {module: f"keep {module!r}" for module in table.plain_linears()}
        for module in self._excluded:  # what nobody asked to keep plain is a mistake of the file, never skipped
            if module not in keep:
                raise config.bad("keep", f"{module}, whose weight is plain", list(keep))

    @property
    def modules(self) -> Sequence[str]:
        return self._modules

    @property
    def excluded(self) -> Mapping[str, str]:
        return self._excluded

    def tensors(self, module: str) -> Sequence[str]:
        return f"{module}.nibbles", f"{module}.steps"

    def describe(self, module: str) -> LinearFormat:
        nibbles, steps = self.tensors(module)
        n, half = self.index.expect(nibbles, ("U8",), (None, None)).shape
        self.index.expect(steps, ("F16",), (n, 2 * half // self._group))
        return LinearFormat(module, n, 2 * half, Format.parse(f"int4.g{self._group}*fp16"))

    def read(self, module: str) -> LinearSpec:
        nibbles, steps = self.index.read_all(self.tensors(module)).values()
        checks.scales(self.index, f"{module}.steps", steps)  # NaN, Inf and 0 are one error that names the tensor
        codes = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(1).to(torch.int8) - 8
        return LinearSpec(QTensor(self.describe(module).weight, codes, steps), name=module)


scheme = MappingScheme(Acme4)
