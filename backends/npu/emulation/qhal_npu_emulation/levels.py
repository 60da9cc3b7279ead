"""The report of every level by its name: what was asked, how much of it holds, and the verdict.

L0 layout     int4 words against the wheel's own packer, sizes of FRACTAL_NZ storage against the wheel's own
L1 schema     every call of the backend against the wheel's schemas, and these against the dumped ones
L1 meta       every call against the wheel's Meta kernel: shapes and types
L1 host       every path through the wheel's host code to an aclnn entry point, per generation and version of CANN
L2 emulated   conformance level 0, more kinds of products, and a whole model by ModelSlim's command, per generation
L3 device     nothing here: only a device gives it
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from qhal_npu_emulation import ARCHS, model
from qhal_npu_emulation.host import RUNS

NONE = "not run: only a device gives it"


def report(parts: dict[str, Any]) -> dict[str, Any]:
    """What all processes found, as one record with a line per level."""
    suites = [parts[f"suite {arch}"] for arch in ARCHS]
    hosts = [parts[f"host {arch} {cann}"] for arch, cann in RUNS]
    wrong = parts["wrong"] + [row for h in hosts for row in h["wrong"]]
    found: dict[str, Any] = {
        "torch": version("torch"),
        "torch_npu": version("torch_npu"),
        "stand-ins": parts["stand-ins"],
        "levels": [*_bytes(hosts), *_calls(suites), *_host(hosts), *_emulated(suites), *_models(parts["model"])],
        "profiles": {s["arch"]: {name: p["verdict"] for name, p in s["profiles"].items()} for s in suites},
        "required": {
            s["arch"]: {name: [p["passed"], p["required"]] for name, p in s["profiles"].items()} for s in suites
        },
        "paths": [
            {"arch": h["arch"], "cann": h["cann"], **{k: p[k] for k in ("name", "reached", "nz", "fault")}}
            for h in hosts
            for p in h["paths"]
        ],
        "wrong": wrong,
        "modelslim": parts["golden"],
        "model": parts["model"],
        "failed": [f"{s['arch']}: {line}" for s in suites for line in s["failed"]],
        "L3 device": NONE,
    }
    bad = [line for line in found["levels"] if line["held"] != line["asked"]]
    golden = [r for r in parts["golden"] for c in ("fp32", "bf16") if r[c]["outputs"] != r[c]["within"]]
    unrefused = [row for row in wrong if not row["refused"]]
    found["verdict"] = "fail" if bad or golden or unrefused or found["failed"] else "pass"
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    rows = [f"{v['level']:12} {v['of']:28} {v['held']} of {v['asked']} {v['what']}" for v in found["levels"]]
    rows += [f"L3 device    {NONE}"]
    rows += [f"{arch}: {_profiles(verdicts)}" for arch, verdicts in found["profiles"].items()]
    for w in found["wrong"]:
        rows.append(f"wrong call   {w['call']}: {'refused by ' + w['level'] if w['refused'] else 'PASSED'}")
    for column in ("fp32", "bf16"):
        outputs = sum(r[column]["outputs"] for r in found["modelslim"])
        within = sum(r[column]["within"] for r in found["modelslim"])
        rows.append(f"ModelSlim    {column} activations: {within} of {outputs} outputs within their bound")
    rows += [f"ModelSlim    {row['case']}, {model.line(row)}" for row in found["model"]]
    rows += [f"failed: {line}" for line in found["failed"]]
    rows += [f"failed: {p['arch']} {p['name']}: {p['fault']}" for p in found["paths"] if p["fault"]]
    return [*rows, f"{found['verdict']} in {found['seconds']} s, torch_npu {found['torch_npu']}"]


def _profiles(verdicts: dict[str, str]) -> str:
    whole = [name for name, word in verdicts.items() if word == "pass"]
    return f"whole: {', '.join(whole)}; not: {', '.join(n for n in verdicts if n not in whole)}"


def _line(level: str, of: str, held: int, asked: int, what: str) -> dict[str, Any]:
    return {"level": level, "of": of, "held": held, "asked": asked, "what": what}


def _bytes(hosts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    packed = sum(h["packer"]["int4"] for h in hosts)
    sizes = [mine == theirs for h in hosts for theirs, mine in h["packer"]["nz_elements"]]
    return [
        _line("L0 layout", "int4 words", packed, len(hosts), "are the wheel's own packer's"),
        _line("L0 layout", "FRACTAL_NZ storage", sum(sizes), len(sizes), "have the wheel's size"),
    ]


def _calls(suites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for s in suites:
        made, met, spelt = (sum(s[k].values()) for k in ("calls", "meta", "keywords"))
        rows.append(_line("L1 schema", s["arch"], spelt, made, "calls have the wheel's keywords"))
        rows.append(_line("L1 meta", s["arch"], met, made, "calls have the Meta kernel's shapes and types"))
    dumped = suites[0]["schemas"]
    same = dumped["dumped"] - len(dumped["differ"])
    return [_line("L1 schema", "schemas.txt", same, dumped["dumped"], "are the wheel's"), *rows]


def _host(hosts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        _line(
            "L1 host",
            f"{h['arch']} ({h['soc']}), CANN {h['cann']}",
            sum(not p["fault"] for p in h["paths"]),
            len(h["paths"]),
            "paths reach their aclnn entry with the emulation's values",
        )
        for h in hosts
    ]


def _emulated(suites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for s in suites:
        c = s["counts"]
        ran = c["pass"] + c["fail"] + c["error"]
        refused = f"cases of conformance level 0 ({c['unsupported']} refused, {c['skip']} skipped)"
        rows.append(_line("L2 emulated", s["arch"], c["pass"], ran, refused))
        more = s["more"]
        rows.append(_line("L2 emulated", f"{s['arch']}, more kinds", more["passed"], more["cases"], "cases"))
        fused, what = s["fused"], "questions of fused attention, of every line of its table"
        rows.append(_line("L2 emulated", f"{s['arch']}, attention", fused["held"], fused["asked"], what))
    return rows


def _models(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    what = "layers of a whole model by ModelSlim's command within their class of what they met"
    return [
        _line("L2 emulated", f"{r['arch']}, {r['case']}", r["products"]["within"], r["products"]["outputs"], what)
        for r in rows
    ]
