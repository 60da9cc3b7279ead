"""Loading: what `Checkpoint.spec` takes for one module of every family, against a plain copy and against the peer.

    python benchmarks/load_speed.py [--json] [--rows N] [--columns K] [--threads N] [--repeat N] [--only WORD ...]

Per case, best of several turns that go round the ways: `get_tensor` (maps the file, reads nothing), its tensors cloned,
`spec`, and the decoder of a package that decodes the same tensors on a processor, where there is one. One thread is
measured in processor time, which other programs change less; several on the clock. Files are in the page cache.

Bars: `spec` at least 3 times as fast as the peer, and at least 0.25 times as fast as the clone of the file's tensors.
A canonical code takes a byte (an index of a codebook four), so packed files grow while they are read: "floor" clones as
many bytes as the spec holds, and clone/floor is the ratio that no reader which makes such codes can pass. Peers end in
a weight of 16 or 32 bits; "to bf16" is `spec` and the decoding of its weight. "kept" is clone/spec again, every result
of a turn kept as a loader keeps it: there memory is new, and costs page faults. Exits 1 if a bar is missed.

Integers of 1 to 7 bits are spread by compiled loops where numba is installed; QHAL_COMPILED_LOOPS=0 measures the tensor
operations that serve without it. The first turn compiles, or finds on disk, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_cases import Case, all_cases
from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.tensors import QTensor
from qhal_schemes import open_checkpoint

PEER_BAR, CLONE_BAR = 3.0, 0.25
WAYS = ("get_tensor", "clone", "floor", "spec", "to bf16", "peer")
KEPT = 4


def measure(case: Case, n: int, k: int, repeat: int, folder: Path) -> dict[str, Any]:
    """Seconds of every way, and the bars."""
    folder.mkdir()
    files = case.make(n, k, torch.Generator().manual_seed(0))
    path = files.write(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # synthetic configurations say little
        ckpt = open_checkpoint(path)
    module, peer = files.target or files.module, files.peer

    def weight() -> QTensor | CodebookTensor:
        found = ckpt.spec(module).weight
        assert isinstance(found, QTensor | CodebookTensor)
        return found

    def read() -> dict[str, Tensor]:
        return files.get_tensors(folder)

    def clone() -> object:
        return [t.clone() for t in read().values()]

    held = torch.zeros(weight().nbytes, dtype=torch.uint8)
    runs: dict[str, Callable[[], object]] = {
        "get_tensor": read,
        "clone": clone,
        "spec": weight,
        "to bf16": lambda: weight().dequantize(torch.bfloat16),
        "floor": held.clone,
    }
    if peer is not None:
        runs["peer"] = lambda: peer(read())
    best = fastest(runs, repeat)
    kept = fastest(
        {"clone": lambda: [clone() for _ in range(KEPT)], "spec": lambda: [weight() for _ in range(KEPT)]}, 3
    )
    ratios = {"clone / spec": best["clone"] / best["spec"], "floor / spec": best["floor"] / best["spec"]}
    ratios["kept clone / spec"] = kept["clone"] / kept["spec"]
    bars = {"clone": ratios["clone / spec"] >= CLONE_BAR}
    if peer is not None:
        ratios |= {"peer / spec": best["peer"] / best["spec"], "peer / to bf16": best["peer"] / best["to bf16"]}
        bars["peer"] = ratios["peer / spec"] >= PEER_BAR
    size = sum(t.nbytes for t in read().values())
    return {"case": case.title, "bytes": size, "seconds": best, "ratios": ratios, "bars": bars}


def fastest(runs: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """The least seconds of each way, of turns that go round; the first turn warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {one: float("inf") for one in runs}
    for turn in range(repeat + 1):
        for one, run in runs.items():
            start = clock()
            result = run()  # freed after the clock has stopped
            seconds = clock() - start
            del result
            if turn:
                best[one] = min(best[one], seconds)
    return best


def main() -> int:
    cases = all_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases with one of these in their name")
    options = parser.parse_args()
    chosen = [case for title, case in cases.items() if any(word.lower() in title.lower() for word in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: no case has that in its name; there are {', '.join(cases)}")
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, case in enumerate(chosen):
            folder = Path(scratch) / str(i)
            found.append(measure(case, options.rows, options.columns, options.repeat, folder))
            for file in folder.iterdir():
                file.unlink()
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"threads": options.threads, "load average": load, "cases": found}, indent=2))
    else:
        report(found)
        print(f"threads {options.threads}, load average {load:.1f}")
    return 0 if all(all(one["bars"].values()) for one in found) else 1


def report(found: list[dict[str, Any]]) -> None:
    """One line a case: milliseconds of every way, then the ratios, then the bars that are missed."""
    ratios = ("clone / spec", "floor / spec", "kept clone / spec", "peer / spec", "peer / to bf16")
    titles = ("clone/spec", "floor/spec", "kept", "peer/spec", "/to bf16")
    print(f"{'ms':28}{'MB':>7}" + "".join(f"{t:>11}" for t in (*WAYS, *titles)))
    for one in found:
        cells = [f"{one['seconds'][way] * 1e3:11.2f}" if way in one["seconds"] else f"{'-':>11}" for way in WAYS]
        cells += [f"{one['ratios'][r]:11.2f}" if r in one["ratios"] else f"{'-':>11}" for r in ratios]
        missed = [f"MISSED {bar}" for bar, holds in one["bars"].items() if not holds]
        print(f"{one['case']:28}{one['bytes'] / 1e6:7.1f}{''.join(cells)}  {' '.join(missed)}")


if __name__ == "__main__":
    sys.exit(main())
