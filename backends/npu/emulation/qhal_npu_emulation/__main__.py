"""`python -m qhal_npu_emulation levels --out FOLDER`: every level, two processes at a time, and one report.

Other words: `schemas` rewrites schemas.txt from the wheel, `tables [--check]` the tables of docs/npu.md from a report,
`model FOLDER --text FILE [--arch A2 ...]` runs a whole checkpoint (`model.py`); with `--json` its rows, one a line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qhal_npu_emulation import ARCHS


def main() -> int:
    """The exit code: 0 it is so, 1 something failed."""
    parser = argparse.ArgumentParser(prog="qhal_npu_emulation", description=__doc__)
    parser.add_argument("word", choices=("levels", "schemas", "tables", "model", "part"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("build/conformance/npu"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--text", type=Path, help="model: the text of the perplexity")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["A2"], help="model: generations")
    parser.add_argument("--skip", type=int, default=0, help="model: characters before the first window")
    parser.add_argument("--windows", type=int, default=2, help="model: windows of the text")
    parser.add_argument("--length", type=int, default=512, help="model: tokens of a window")
    parser.add_argument("--json", action="store_true", help="model: rows as JSON")
    asked = parser.parse_args()
    if asked.word == "model":
        if len(asked.rest) != 1 or asked.text is None:
            parser.error("model takes one checkpoint folder, and --text FILE")
        return _model(Path(asked.rest[0]), asked)
    if asked.word == "part":
        print(json.dumps(_part(asked.rest)))
        return 0
    if asked.word == "schemas":
        return _dump()
    if asked.word == "tables":
        from qhal_npu_emulation import tables

        return tables.main(asked.out / "report.json", check=asked.check)
    from qhal_npu_emulation import levels

    start = time.perf_counter()
    found = levels.report(_parts())
    found["seconds"] = round(time.perf_counter() - start, 1)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    for line in levels.lines(found):
        print(line)
    return 0 if found["verdict"] == "pass" else 1


def _parts() -> dict[str, Any]:
    """What every process found, by its words. Suites last longest and start first."""
    from qhal_npu_emulation import standins
    from qhal_npu_emulation.host import RUNS

    long, chips = [("suite", arch) for arch in ARCHS], [("host", *run) for run in RUNS]
    words: list[tuple[str, ...]] = [*long, *chips, ("wrong",), ("golden",), ("model",)]
    built = standins.build()
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip((" ".join(w) for w in words), pool.map(_process, words), strict=True))
    return {"stand-ins": built, **found}


def _process(words: tuple[str, ...]) -> Any:
    command = [sys.executable, "-m", "qhal_npu_emulation", "part", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _part(words: list[str]) -> Any:
    """One process's share: stand-ins can be loaded once per process, as one chip."""
    from qhal_npu_emulation import golden, host, model, suite, wrong

    if words[0] == "suite":
        return suite.run(words[1])
    if words[0] == "host":
        return host.run(words[1], words[2]) | {"wrong": wrong.on_device() if words[1] == "A2" else []}
    if words[0] == "wrong":
        return wrong.plain()
    return model.committed() if words[0] == "model" else golden.run()


def _model(folder: Path, asked: argparse.Namespace) -> int:
    import qhal_schemes
    from qhal.errors import QhalError
    from qhal_npu_emulation import model

    def show(backend: str, done: int) -> None:
        print(f"{backend}: window {done} of {asked.windows}", file=sys.stderr, flush=True)

    try:
        qhal_schemes.open_checkpoint(folder)  # what is wrong with it is said before anything heavy is imported
        ids = model.text_ids(folder, asked.text, skip=asked.skip, windows=asked.windows, length=asked.length)
        rows = model.run(folder, tuple(asked.arch), ids, show)
    except (QhalError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(json.dumps(row) if asked.json else model.line(row))
    return 0 if all(row["products"]["within"] == row["products"]["outputs"] for row in rows) else 1


def _dump() -> int:
    from qhal_npu_emulation import library, standins

    standins.load()
    import torch

    names = {*library.KERNELS, "get_npu_format"}
    lines = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.removeprefix("npu::") in names)
    library.SCHEMAS.write_text("\n".join(line for line in lines if ".out(" not in line and "._" not in line) + "\n")
    print(f"{len(lines)} schemas in {library.SCHEMAS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
