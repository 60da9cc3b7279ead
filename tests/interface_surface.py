"""The surface of the interface as text: what a backend may rely on. `python tests/interface_surface.py` prints it.

`interface_1_0.json` beside this file is the surface of 1.0. From then on it is append-only: `test_versions.py` holds
today's surface to it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any, get_args

import qhal
from qhal import caches, codecs, groups, interface, layer_formats, operands, prepared, requests, selection

RECORDS = (
    *get_args(requests.Request),
    requests.Support,
    requests.Arithmetic,
    codecs.Codec,
    operands.Operand,
    groups.Offsets,
    groups.Masked,
    groups.Indexed,
    layer_formats.Activation,
    layer_formats.LinearFormat,
    layer_formats.ExpertsFormat,
    layer_formats.KVFormat,
    caches.Plane,
    caches.Limits,
    prepared.Prepared,
    prepared.PreparedLinear,
    prepared.PreparedExperts,
    interface.MemoryStats,
    selection.BackendInfo,
    selection.Device,
)
"""The values that pass between engines, schemes and backends."""


def surface() -> dict[str, Any]:
    """Signatures of QuantOps, fields of records with their defaults, and the words that callers may use."""
    return {
        "QuantOps": {n: _member(m) for n, m in sorted(vars(interface.QuantOps).items()) if not n.startswith("_")},
        "records": {kind.__name__: _fields(kind) for kind in RECORDS},
        "qhal": sorted(qhal.__all__),
        "classes": {c.name: int(c) for c in requests.NumericsClass},
    }


def _member(member: object) -> str:
    if callable(member):
        parameters = inspect.signature(member).parameters.values()
        return ", ".join(f"{p.kind.name} {p.name}{_default(p.default, inspect.Parameter.empty)}" for p in parameters)
    return "property" if isinstance(member, property) else "value"


def _fields(kind: type) -> list[str]:
    return [f"{f.name}{_default(f.default, dataclasses.MISSING)}" for f in dataclasses.fields(kind) if f.init]


def _default(value: object, missing: object) -> str:
    return "" if value is missing else f" = {value!r}"


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1))
