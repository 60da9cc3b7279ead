"""The summary of a checkpoint, as JSON-able values: formats with counts and bytes, rules, cache, leftovers, totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qhal.layer_formats import LinearFormat
from qhal_schemes.base import SchemeMapping
from qhal_schemes.evidence import COMPARED, UNCOMPARED
from qhal_schemes.experts import Group
from qhal_schemes.modules import Account


def summarize(
    mapping: SchemeMapping,
    formats: Mapping[str, LinearFormat],
    account: Account,
    groups: Mapping[str, Group],
) -> dict[str, Any]:
    """What `qhal inspect` prints. Bytes are those of the files; a tensor that modules share counts in each of them.

    formats: a row for every weight, input, layout and what stands around the product; `members` are its modules.
    """
    index = mapping.index
    rules: dict[str, list[str]] = {}
    for module, rule in mapping.excluded.items():
        rules.setdefault(rule, []).append(module)
    files = Counter(entry.file for entry in index.values())
    return {
        "path": str(index.folder),
        "method": mapping.config.method or "none",
        "dtype": str(mapping.config.dtype).removeprefix("torch."),
        "formats": _formats(mapping, formats),
        "experts": [{"prefix": g.prefix, "experts": g.count} for g in groups.values()],
        "excluded": [{"rule": rule, "modules": names} for rule, names in rules.items()],
        "kv": _caches(mapping),
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
    """One row for every kind of module, largest first."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    stacked = {m: group.count for group in mapping.stacked.values() for m in group.modules()}
    for module, f in formats.items():
        what = {
            "weight": str(f.weight),
            "input": _input(f),
            "around": _around(f),
            "layout": mapping.layout(module),
            "evidence": COMPARED if mapping.compared(module) else UNCOMPARED,
        }
        row = rows.setdefault(tuple(what.values()), what | {"modules": 0, "weights": 0, "bytes": 0, "members": []})
        row["modules"] += 1
        row["weights"] += f.n * f.k * stacked.get(module, 1)
        row["bytes"] += sum(mapping.index[name].nbytes for name in set(mapping.tensors(module)))
        row["members"].append(module)
    for row in rows.values():
        row["bits_per_weight"] = round(8 * row["bytes"] / row["weights"], 3)
    return sorted(rows.values(), key=lambda row: -int(row["bytes"]))


def _input(f: LinearFormat) -> str:
    given = "none" if f.input is None else str(f.input)
    given += " (static)" * f.static_input
    return given if f.decode_input is None else f"{given}; decoding {f.decode_input}" + " (static)" * f.static_decode


def _around(f: LinearFormat) -> str:
    """Rotations, the low-rank branch, the rounding of the weight and the order of groups; "" for a bare product."""
    parts = [f"input {kind[0]}" for kind in f.rotate_in] + [f"output {kind[0]}" for kind in f.rotate_out]
    parts += [f"low rank {f.low_rank}"] if f.low_rank else []
    parts += [f"weight rounded to {f.operand}"] if f.operand is not None else []
    return ", ".join([*parts, "group index"] if f.group_index else parts)


def _caches(mapping: SchemeMapping) -> list[dict[str, Any]]:
    """One row for every cache format."""
    found: Counter[tuple[str, bool]] = Counter()
    for layer in mapping.kv_layers:
        f = mapping.kv_format(layer)
        if f is not None:
            found[str(f), mapping.cache_compared(layer)] += 1
    return [
        {"format": name, "layers": count, "evidence": COMPARED if compared else UNCOMPARED}
        for (name, compared), count in found.items()
    ]
