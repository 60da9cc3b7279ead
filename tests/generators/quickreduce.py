"""Writes tests/golden/comm/quickreduce: what a QuickReduce-like all-reduce sends and sums, by a model in numpy.

Run: python tests/generators/quickreduce.py

The model is our own, written from the published behaviour of the kernels (aiter's quick_all_reduce headers and their
ports in vLLM and SGLang), and shares nothing with qhal: fp16 arithmetic after every step. 64 contiguous values form two
groups by parity; the scale is the value of largest magnitude times -1/2^(b-1), so that the peak sits on the most
negative code; values are multiplied by 1 / (scale + 2^-24) and rounded half to even; the owner of a segment adds the
decoded contributions in rank order in fp16, its own quantized too, and quantizes the sum once more.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

OUT = Path(__file__).parents[1] / "golden" / "comm" / "quickreduce"
BITS = {"int8": 8, "int6": 6, "int4": 4, "int3": 3}
WORLD, ROWS, COLUMNS, SEED = 4, 4, 128, 20
F16 = npt.NDArray[np.float16]
half = np.float16


def encode(x: F16, bits: int) -> tuple[F16, F16]:
    """Codes (as numbers) [runs, 2, 32] and scales [runs, 2, 1] of contiguous values."""
    top = 1 << (bits - 1)
    groups = x.reshape(-1, 32, 2).transpose(0, 2, 1)
    high, low = groups.max(-1, keepdims=True), groups.min(-1, keepdims=True)
    peak = np.where(np.abs(high) > np.abs(low), high, low)
    scale = (peak * half(-1.0 / top)).astype(half)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = (half(1) / (scale + half(2**-24)).astype(half)).astype(half)
        steps = np.clip((groups * inverse).astype(half), half(-top), half(top - 1))
    return np.rint(np.nan_to_num(steps)).astype(half), scale


def decode(codes: F16, scale: F16) -> F16:
    """Contiguous values of codes and scales."""
    return (codes * scale).astype(half).transpose(0, 2, 1).reshape(-1)


def all_reduce(xs: list[F16], bits: int) -> tuple[F16, F16]:
    """The two-shot sum, which every rank gets; and the sums as their owners have them, before they travel back."""
    segments = [np.split(x.reshape(-1), len(xs)) for x in xs]
    sums, out = [], []
    for owner in range(len(xs)):
        total = np.zeros_like(segments[0][owner])
        for rank in range(len(xs)):
            total = (total + decode(*encode(segments[rank][owner], bits))).astype(half)
        sums.append(total)
        out.append(decode(*encode(total, bits)))
    return np.concatenate(out), np.concatenate(sums)


def inputs(rng: np.random.Generator, bits: int) -> dict[str, F16]:
    """`normal`: random numbers. `grid`: codes times a power of two, with the most negative one in every group."""
    shape = (WORLD, ROWS, COLUMNS)
    normal = (rng.standard_normal(shape) * np.exp(rng.standard_normal((WORLD, ROWS, 1)))).astype(half)
    top = 1 << (bits - 1)
    grid = rng.integers(-top, top, shape).astype(half)
    grid[..., ::64] = grid[..., 1::64] = -top
    grid[0, 0, :64] = 0  # an empty run
    return {"normal": normal, "grid": (grid * half(2.0**-4)).astype(half)}


def main() -> None:
    """Write expected.safetensors and provenance.json."""
    rng, found = np.random.default_rng(SEED), {}
    for codec, bits in BITS.items():
        for kind, xs in inputs(rng, bits).items():
            coded = [encode(x, bits) for x in xs]
            found[f"{codec}.{kind}.x"] = xs
            found[f"{codec}.{kind}.codes"] = np.stack([c for c, _ in coded]).astype(np.int8)
            found[f"{codec}.{kind}.scales"] = np.stack([s for _, s in coded])
            reduced, sums = all_reduce(list(xs), bits)
            found[f"{codec}.{kind}.all_reduce"] = reduced.reshape(ROWS, COLUMNS)
            found[f"{codec}.{kind}.sums"] = sums.reshape(ROWS, COLUMNS)
    OUT.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, OUT / "expected.safetensors")
    provenance = {
        "family": "comm",
        "case": "quickreduce",
        "peer": "none: an independent numpy model of the QuickReduce codec and two-shot all-reduce",
        "peer_written": False,
        "synthesized": True,
        "produced_by": "tests/generators/quickreduce.py",
        "seed": SEED,
        "numpy": np.__version__,
        "world": WORLD,
        "shape": [ROWS, COLUMNS],
        "expected": {
            "<codec>.<kind>.codes": "int8 [world, runs of 64, parity, 32]",
            "<codec>.<kind>.scales": "fp16 [world, runs of 64, parity, 1]",
            "<codec>.<kind>.all_reduce": "fp16 [rows, columns], the same on every rank",
            "<codec>.<kind>.sums": "fp16 [rows, columns], before they are quantized again",
        },
        "notes": [
            "no device wrote this: it shows agreement of two descriptions, not of a kernel",
            "the model multiplies by an fp16 reciprocal where qhal divides in fp32: codes near a tie may differ by one",
        ],
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
