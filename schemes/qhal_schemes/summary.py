"""The summary of a checkpoint, as JSON-able values: formats with counts and bytes, rules, cache, leftovers, totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qhal.layer_formats import LinearFormat
from qhal_schemes.base import SchemeMapping
from qhal_schemes.experts import Group
from qhal_schemes.modules import Account


def summarize(
    mapping: SchemeMapping,
    formats: Mapping[str, LinearFormat],
    account: Account,
    groups: Mapping[str, Group],
) -> dict[str, Any]:
    """What `qhal inspect` prints. Bytes are those of the files; a tensor that modules share counts in each of them."""
    index = mapping.index
    rules: dict[str, list[str]] = {}
    for module, rule in mapping.excluded.items():
        rules.setdefault(rule, []).append(module)
    caches = Counter(str(f) for layer in mapping.kv_layers if (f := mapping.kv_format(layer)) is not None)
    files = Counter(entry.file for entry in index.values())
    return {
        "path": str(index.folder),
        "method": mapping.config.method or "none",
        "dtype": str(mapping.config.dtype).removeprefix("torch."),
        "formats": _formats(mapping, formats),
        "experts": [{"prefix": g.prefix, "experts": g.count} for g in groups.values()],
        "excluded": [{"rule": rule, "modules": names} for rule, names in rules.items()],
        "kv": [{"format": name, "layers": count} for name, count in caches.items()],
        "extra": [{"tensor": name, "why": why} for name, why in account.extra.items()],
        "files": [{"file": file, "tensors": count} for file, count in files.items()],
        "files_not_read": list(index.unread),
        "totals": {
            "tensors": len(index),
            "consumed": len(account.consumed),
            "plain": len(account.plain),
            "extra": len(account.extra),
            "modules_quantized": len(formats),
            "modules_plain": len(mapping.excluded),
            "bytes": sum(entry.nbytes for entry in index.values()),
        },
    }


def _formats(mapping: SchemeMapping, formats: Mapping[str, LinearFormat]) -> list[dict[str, Any]]:
    """One row for every pair of weight and input format, largest first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    stacked = {m: group.count for group in mapping.stacked.values() for m in group.modules()}
    for module, f in formats.items():
        weight, given = str(f.weight), "none" if f.input is None else str(f.input)
        given += " (static)" if f.static_input else ""
        row = rows.setdefault(
            (weight, given), {"weight": weight, "input": given, "modules": 0, "weights": 0, "bytes": 0}
        )
        row["modules"] += 1
        row["weights"] += f.n * f.k * stacked.get(module, 1)
        row["bytes"] += sum(mapping.index[name].nbytes for name in set(mapping.tensors(module)))
    return sorted(rows.values(), key=lambda row: -int(row["bytes"]))
