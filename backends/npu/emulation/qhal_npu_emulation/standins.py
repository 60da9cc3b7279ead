"""Stand-ins for the CANN libraries that the torch_npu wheel is linked with, built from the wheel's undefined symbols.

With them the wheel loads on a processor: its schemas and Meta kernels are there (`load()`), and with `device=True` one
device in host memory, whose aclnn entry points record their arguments (`taken`). Nothing of CANN or torch_npu is
committed. Needs gcc, nm and readelf on x86-64 Linux. One load per process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "qhal-npu-standins"
SOURCE = Path(__file__).with_name("standin.c")
_FAIL = 507033
"""An ACL error code: what really needs the runtime fails loudly."""
_SYSTEM = (
    "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1",
    "ld-linux-x86-64.so.2",
)  # fmt: skip
_NO_DEVICE = """
#include <stdint.h>
int aclrtGetDeviceCount(uint32_t *n) { if (n) *n = 0; return 0; }
char *aclrtGetSocName(void) { return 0; }
char *aclGetRecentErrMsg(void) { return "no runtime: a stand-in of CANN"; }
"""
_handle: list[ctypes.CDLL] = []


def build(folder: Path = FOLDER) -> dict[str, int]:
    """Both sets of libraries; how many symbols, libraries and aclnn entry points."""
    site = Path(sysconfig.get_paths()["purelib"])
    wheel = site / "torch_npu"
    ours = [*sorted(wheel.glob("_C*.so")), *sorted((wheel / "lib").glob("*.so"))]
    known = sorted((site / "torch" / "lib").glob("*.so*"))
    wanted = {n for p in ours for n in _needed(p)} - {p.name for p in (*ours, *known)}
    system = [Path(_run("gcc", f"-print-file-name={name}").strip()) for name in sorted(wanted & set(_SYSTEM))]
    undefined = {name for p in ours for kind, name in _symbols(p, "--undefined-only") if kind == "U"}
    defined = {name for p in (*ours, *known, *system) for _, name in _symbols(p, "--defined-only")}
    missing = sorted(n for n in undefined - defined if not n.startswith(("Py", "_Py")))
    libraries = sorted(wanted - set(_SYSTEM))
    text = b"".join(p.read_bytes() for p in (wheel / "lib").glob("*.so"))
    names = {m.decode() for m in re.findall(rb"(?<=\x00)acl[A-Za-z0-9]+(?=\x00)", text)}
    entries = sorted({n.removesuffix("GetWorkspaceSize") for n in names if n.startswith("aclnn")} - {"aclnn"})
    _library(
        folder / "plain",
        libraries,
        _NO_DEVICE,
        [_fails(n) for n in missing if f" *{n}(" not in _NO_DEVICE and f" {n}(" not in _NO_DEVICE],
    )
    base = SOURCE.read_text()
    written = set(re.findall(r"\b(acl\w+)\(", base)) | set(re.findall(r"D\((\w+)\)", base))
    others = ("aclrt", "aclmdl", "aclop", "aclprof", "aclsys", "aclSet", "aclGet")
    more = {n for n in names if n.startswith(others)} | set(missing)
    lines = [f'long {n}(void) {{ note("{n}"); return 0; }}' for n in sorted(more - written)]
    lines += [f"WS({n})" for n in entries if n not in written]
    _library(folder / "device", [*libraries, "libopapi.so"], base, lines)
    return {"symbols": len(missing), "libraries": len(libraries), "aclnn": len(entries)}


def load(*, device: bool = False, soc: str = "Ascend910B1", cann: str = "8.5.0", folder: Path = FOLDER) -> None:
    """Load torch_npu against the stand-ins; device: with one device, of that chip under that version of CANN."""
    if _handle:
        return
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")  # else aclnn calls run in another thread
    os.environ.update(QHAL_NPU_STANDIN_SOC=soc, QHAL_NPU_STANDIN_CANN=cann)
    chosen = folder / ("device" if device else "plain")
    if not chosen.is_dir():
        build(folder)
    # glibc matches what is needed with the SONAME of what is loaded: no LD_LIBRARY_PATH
    _handle.extend(ctypes.CDLL(str(p), mode=ctypes.RTLD_GLOBAL) for p in sorted(chosen.glob("lib*.so")))
    import torch_npu

    assert torch_npu.__version__
    if device:
        _handle[0].qhal_standin_log.restype = ctypes.c_char_p


def taken() -> list[tuple[str, list[Any]]]:
    """(aclnn entry point, its arguments) of every call since the last time; tensors as dtype, format, view, storage."""
    rows = [json.loads(s) for s in _handle[0].qhal_standin_log().decode().splitlines()]
    _handle[0].qhal_standin_clear()
    new = {r["new"]: r for r in rows if "new" in r}

    def shown(a: Any) -> Any:
        r = new.get(a) if isinstance(a, str) else None
        if r is None:
            return a
        return [shown(x) for x in r["of"]] if "of" in r else {k: v for k, v in r.items() if k != "new"}

    return [(r["call"], [shown(a) for a in r["args"]]) for r in rows if "call" in r]


def _library(folder: Path, names: list[str], base: str, lines: list[str]) -> None:
    """The first library carries every symbol; the others only satisfy what is linked by name."""
    folder.mkdir(parents=True, exist_ok=True)
    source, empty = folder / "standin.c", folder / "empty.c"
    source.write_text("\n".join([base, *lines, ""]))
    empty.write_text("\n")
    flags = ("gcc", "-shared", "-fPIC", "-O0", "-w", "-fno-builtin")
    first = names[0]
    _run(*flags, f"-Wl,-soname,{first}", "-o", str(folder / first), str(source))
    for name in names[1:]:
        link = ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"-L{folder}", f"-l:{first}")
        _run(*flags, f"-Wl,-soname,{name}", "-o", str(folder / name), str(empty), *link)


def _fails(name: str) -> str:
    if name.startswith(("_ZTV", "_ZTI", "_ZTS")):  # vtables and type info are data
        return f"void *{name}[64];"
    return f"long {name}(void) {{ return {_FAIL}; }}"


def _symbols(path: Path, which: str) -> Iterator[tuple[str, str]]:
    for line in _run("nm", "-D", which, str(path)).splitlines():
        *_, kind, name = line.split()
        yield kind, name.split("@")[0]


def _needed(path: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.+?)\]", _run("readelf", "-d", str(path)))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
