"""The plan: what will execute for every layer, decided and shown before any weight is allocated.

A path is a downgrade if it skips, adds or changes the quantization of either operand, or if its numerics class is
looser than the format's declared minimum. A rule deviation (same format, but the hardware fixes another rule) is
conditional and always listed. Policies: "error" refuses downgrades, "exact" refuses rule deviations too, "allow" runs
and records them, "report" runs nothing and lists what would fail. What a backend cannot execute is refused by all but
"report".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch

from qhal.codebooks import CodebookFormat
from qhal.elements import WIDE, dtype_name
from qhal.errors import FormatError, PlanError, PolicyError, QhalError
from qhal.formats import Format
from qhal.interface import INTERFACE_VERSION, QuantOps
from qhal.layer_formats import LayerFormat
from qhal.layers import requests
from qhal.requests import Arithmetic, Form, GemmRequest, GroupedRequest, NumericsClass, Request, Support, minimum_class
from qhal.specs import ExpertsSpec, KVSpec, LinearSpec

Policy = Literal["exact", "error", "allow", "report"]


class Model(Protocol):
    """Anything that can say what its layers are without reading weights: a qhal_schemes Checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's activations."""

    def layer_formats(self) -> Iterable[LayerFormat]:
        """The frozen summary of every quantized layer and cache, in model order."""


@dataclass(frozen=True)
class PlanEntry:
    """One kind of product. Layers of one kind share an entry: "model.layers.*.mlp.down_proj (32)".

    status  ok | rule (the hardware follows another rule) | downgrade | refused
    """

    name: str
    layers: tuple[str, ...]
    request: Request
    requested: Arithmetic | None
    support: Support
    status: Literal["ok", "rule", "downgrade", "refused"]
    rejected: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def downgrade(self) -> bool:
        """Whether what runs is less than what the checkpoint asks for."""
        return self.status == "downgrade"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        s = self.support
        return {
            "name": self.name,
            "layers": list(self.layers),
            "request": str(self.request),
            "requested": None if self.requested is None else str(self.requested),
            "executes": s.executes,
            "arithmetic": None if s.arithmetic is None else str(s.arithmetic),
            "numerics": None if s.numerics is None else s.numerics.label,
            "minimum": minimum_class(self.request).label,
            "level": s.level,
            "reason": s.reason,
            "rule": None if s.rule is None else str(s.rule),
            "layouts": list(s.layouts),
            "workspace": s.workspace,
            "graph": s.graph,
            "status": self.status,
            "rejected": [list(r) for r in self.rejected],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """What will execute. `digest` is the same on every rank that may start together; compare it before allocating."""

    entries: tuple[PlanEntry, ...]
    policy: str
    backend: str
    device: str
    interface: tuple[int, int]
    dtype: str
    digest: str = field(default="")

    def explain(self, format: Literal["text", "json"] = "text") -> str:
        """The plan as a table for people, or as JSON with the same content."""
        if format not in ("text", "json"):
            raise QhalError(f"explain({format!r}): choose text or json")
        if format == "json":
            record = {
                "backend": self.backend,
                "device": self.device,
                "interface": list(self.interface),
                "policy": self.policy,
                "dtype": self.dtype,
                "digest": self.digest,
                "entries": [e.to_json() for e in self.entries],
            }
            return json.dumps(record, indent=1)
        head = (
            f"plan for {self.backend} on {self.device}, policy {self.policy}, activations {self.dtype}, {self.digest}"
        )
        return "\n".join([head, *(_entry_text(e) for e in self.entries)])

    def offending(self, policy: str) -> tuple[PlanEntry, ...]:
        """The entries that `policy` refuses."""
        refused = {
            "exact": ("refused", "downgrade", "rule"),
            "error": ("refused", "downgrade"),
            "allow": ("refused",),
            "report": (),
        }[policy]
        return tuple(e for e in self.entries if e.status in refused)


def resolve(
    model: Model | Iterable[LinearSpec | ExpertsSpec | KVSpec],
    ops: QuantOps,
    policy: Policy = "error",
    *,
    world: int = 1,
    m: tuple[int, int] = (1, 8192),
    dtype: torch.dtype | None = None,
    numerics: NumericsClass | None = None,
    page: int = 16,
    groups: Form = "offsets",
    top_k: int = 1,
    also: Iterable[tuple[str, Request]] = (),
) -> Plan:
    """Ask `ops` what every layer would execute; refuse by `policy` (PlanError lists every offending entry).

    model     a checkpoint (nothing but its index is read), or specs
    world     ranks of tensor parallelism, for the notes on scales that become per shard
    m         smallest and largest row count that will occur
    dtype     of the activations; default the model's own, bfloat16 for bare specs
    numerics  the loosest class accepted everywhere; default each format's minimum
    page      slots of a page of every cache
    groups    how the engine calls experts, and with how many of them (`top_k`) a token meets if they are indexed
    also      (layer name, request) of what an engine asks beyond the layers themselves, such as attention
    """
    if policy not in get_args(Policy):
        raise PolicyError(f"policy {policy!r}: choose one of {', '.join(get_args(Policy))}")
    if not isinstance(ops, QuantOps):
        raise QhalError(f"resolve: ops is a {type(ops).__name__}, must be what qhal.select returned")
    formats, own_dtype = _formats(model)
    dtype = dtype or own_dtype
    if dtype not in WIDE.values():
        raise FormatError(f"activations of {dtype}: choose one of {', '.join(str(d) for d in WIDE.values())}")
    grouped: dict[Request, list[str]] = {}
    for f in formats:
        for request in requests(f, dtype, m=m, numerics=numerics, page=page, groups=groups, top_k=top_k):
            grouped.setdefault(request, []).append(f.name)
    for name, request in also:
        grouped.setdefault(request, []).append(name)
    entries = tuple(_entry(request, names, ops, world) for request, names in grouped.items())
    plan = Plan(entries, policy, ops.name, str(ops.device), INTERFACE_VERSION, dtype_name(dtype), _digest(entries))
    offending = plan.offending(policy)
    if offending:
        listing = "\n".join(_entry_text(e) for e in offending)
        remedy = "" if any(e.status == "refused" for e in offending) else '; policy="allow" runs them and records each'
        raise PlanError(
            f'policy "{policy}" refuses {len(offending)} of {len(entries)} entries on {ops.name}{remedy}:\n{listing}',
            plan,
        )
    return plan


def _formats(model: Model | Iterable[LinearSpec | ExpertsSpec | KVSpec]) -> tuple[list[LayerFormat], torch.dtype]:
    if isinstance(model, Iterable) and not isinstance(model, str):
        specs = list(model)
        if all(isinstance(spec, LinearSpec | ExpertsSpec | KVSpec) for spec in specs):
            return [spec.format for spec in specs], torch.bfloat16
    elif hasattr(model, "layer_formats"):
        return list(model.layer_formats()), model.dtype
    what = f"{model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
    raise QhalError(f"resolve: the model is {what}, must be an opened checkpoint or a list of specs")


def _entry(request: Request, names: list[str], ops: QuantOps, world: int) -> PlanEntry:
    support = ops.supports(request)
    requested = Arithmetic.of(request)
    return PlanEntry(
        name=_pattern(names),
        layers=tuple(names),
        request=request,
        requested=requested,
        support=support,
        status=_status(request, requested, support),
        notes=_notes(request, world),
    )


def _status(
    request: Request, requested: Arithmetic | None, s: Support
) -> Literal["ok", "rule", "downgrade", "refused"]:
    if not s:
        return "refused"
    changed = (
        requested is not None
        and s.arithmetic is not None
        and (s.arithmetic.x, s.arithmetic.w) != (requested.x, requested.w)
    )
    if changed or (s.numerics is not None and s.numerics > minimum_class(request)):
        return "downgrade"
    return "rule" if s.rule is not None else "ok"


def _notes(request: Request, world: int) -> tuple[str, ...]:
    gemm = request.gemm if isinstance(request, GroupedRequest) else request
    if world == 1 or not isinstance(gemm, GemmRequest):
        return ()
    notes = []
    for axis, size, dim in (("rows (column-parallel)", gemm.n, 0), ("columns (row-parallel)", gemm.k, 1)):
        why = _uncut(gemm.w, size, world, dim)
        if why:
            notes.append(f"{world} ranks cannot cut its {axis}: {why}")
    for f in gemm.x:
        if f.block is not None and f.block.kind in ("row", "tensor"):
            notes.append(f"with {world} ranks a row-parallel input has one {f.block} scale per shard: other bits")
            break
    return tuple(notes)


def _uncut(w: Format | CodebookFormat, size: int, world: int, dim: int) -> str:
    """Why `world` equal parts are impossible along an axis, or ""; the cut itself checks again with the tensors."""
    if size % world:
        return f"{size} does not divide by {world}"
    block = w.block if isinstance(w, Format) else None
    step = (block.rows, block.cols)[dim] if block is not None and block.kind in ("group", "tile") else 1
    return f"parts of {size // world} end inside a block of {step}" if (size // world) % step else ""


def _pattern(names: list[str]) -> str:
    """One readable name for many layers: numbers that differ become *, a count follows."""
    if len(names) == 1:
        return names[0]
    generic = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in names))
    shown = ", ".join(generic[:4]) + (f", and {len(generic) - 4} more" if len(generic) > 4 else "")
    return f"{shown} ({len(names)})"


def _entry_text(e: PlanEntry) -> str:
    s = e.support
    lines = [f"[{e.status}] {e.name}", f"  asked     {e.request}"]
    if s:
        numerics = "" if s.numerics is None else f" [{s.numerics.label}, minimum {minimum_class(e.request).label}]"
        lines.append(f"  executes  {s.executes or s.arithmetic}{numerics}")
    if s.reason:
        lines.append(f"  {'because' if not s else 'note':9} {s.reason}")
    if e.status == "downgrade":
        lines.append(f"  requested {e.requested}, would run {s.arithmetic}")
    if s.rule is not None:
        lines.append(f"  rule      the hardware follows {s.rule or 'the default rule'}")
    if s.nearest is not None:
        lines.append(f"  nearest   {s.nearest}")
    lines.extend(f"  rejected  {kernel}: {reason}" for kernel, reason in e.rejected)
    lines.extend(f"  note      {note}" for note in e.notes)
    return "\n".join(lines)


def _digest(entries: tuple[PlanEntry, ...]) -> str:
    text = "\n".join(f"{e.name}|{e.request!r}|{e.support!r}|{e.status}" for e in entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
