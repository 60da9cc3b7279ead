"""Loading: what `Checkpoint.spec` takes for one module of every family, against a plain copy and against the peer.

    python benchmarks/load_speed.py [--json] [--rows N] [--columns K] [--threads N] [--repeat N] [--only CASE ...]

Per case, best of several turns that go round the ways: `get_tensor` (maps the file, reads nothing), its tensors cloned,
`spec`, and the decompressor of the compressed-tensors package on the tensors that it would get. One thread is measured
in processor time, which other programs hardly change; several on the clock. Files are in the page cache.

Bars: `spec` at least 3 times as fast as the peer, and at least 0.25 times as fast as the clone of the file's tensors.
A canonical code takes a byte, so packed files grow while they are read: "floor" clones as many bytes as the spec holds,
and clone/floor is the ratio that no reader which makes such codes can pass. The peer's decompressor ends in a bf16
weight; "to bf16" is `spec` and the decoding of its weight to the same. No peer for AWQ and GPTQ runs on a processor
here. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import open_checkpoint
from qhal_schemes.compressed_tensors_writer import tensor_layouts
from qhal_schemes.quantizing import resolve_format
from qhal_schemes.source import DTYPES

PEER_BAR, CLONE_BAR = 3.0, 0.25
MODULE = "model.layers.0.mlp.down_proj"
PACKED = ("int4_g128", "uint4_g128", "int3_g32", "int8_g32", "int8", "fp8_row", "fp8_block", "mxfp8", "mxfp4", "nvfp4")
OTHERS = ("awq", "gptq", "gptq desc_act", "gptq 3 bits")


def words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).to(torch.int32)


def compressed(name: str, n: int, k: int, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random tensors in the layout of compressed-tensors, and the quantization section."""
    layout, tensors = resolve_format(name, torch.bfloat16), {}
    for full, one in tensor_layouts(MODULE, n, k, layout).items():
        dtype = DTYPES[one.dtype]
        if full.endswith("weight_shape"):
            tensors[full] = torch.tensor([n, k])
        elif dtype.is_floating_point and dtype.itemsize > 1:
            tensors[full] = (torch.rand(one.shape, generator=g) * 0.01 + 0.001).to(dtype)
        else:  # bytes below 127: no NaN, as a code or as a scale
            raw = torch.randint(1, 126, (one.nbytes,), dtype=torch.uint8, generator=g)
            tensors[full] = raw.view(dtype).reshape(one.shape)
    return tensors, layout.section([])


def other(name: str, n: int, k: int, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same for AWQ and GPTQ, groups of 128."""
    groups, bits = k // 128, 3 if "3" in name else 4
    scales = (torch.rand(groups, n, generator=g) * 0.01 + 0.001).half()
    section: dict[str, Any] = {"bits": bits, "group_size": 128}
    if name == "awq":
        found = {"qweight": words(g, k, n // 8), "qzeros": words(g, groups, n // 8), "scales": scales}
        section |= {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    else:
        order = torch.arange(k) // 128
        order = order[torch.randperm(k, generator=g)] if "desc_act" in name else order
        found = {"qweight": words(g, k * bits // 32, n), "qzeros": words(g, groups, n * bits // 32), "scales": scales}
        found["g_idx"] = order.to(torch.int32)
        section |= {
            "quant_method": "gptq",
            "desc_act": "desc_act" in name,
            "sym": False,
            "checkpoint_format": "gptq_v2",
        }
    return {f"{MODULE}.{leaf}": t for leaf, t in found.items()}, section


def peer(section: dict[str, Any], read: Callable[[], dict[str, Tensor]]) -> Callable[[], object] | None:
    """The package's decompressor of one module, or None if the file is not in its format."""
    if section["quant_method"] != "compressed-tensors":
        return None
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = section["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    return lambda: compressor.decompress({n.rpartition(".")[2]: t for n, t in read().items()}, scheme)["weight"]


def measure(name: str, n: int, k: int, repeat: int, folder: Path) -> dict[str, Any]:
    """Seconds of every way, and the bars."""
    tensors, section = (compressed if name in PACKED else other)(name, n, k, torch.Generator().manual_seed(0))
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": section})
    )
    save_file(tensors, folder / "model.safetensors")

    def read() -> dict[str, Tensor]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {one: file.get_tensor(one) for one in tensors}

    ckpt = open_checkpoint(folder)

    def to_bf16() -> Tensor:
        weight = ckpt.spec(MODULE).weight
        assert isinstance(weight, QTensor)
        return weight.dequantize(torch.bfloat16)

    runs: dict[str, Callable[[], object] | None] = {
        "get_tensor": read,
        "clone": lambda: [t.clone() for t in read().values()],
        "spec": lambda: ckpt.spec(MODULE),
        "to bf16": to_bf16,
        "peer": peer(section, read),
    }
    whole = torch.zeros(sum(t.nbytes for t in planes(ckpt.spec(MODULE)).values()), dtype=torch.uint8)
    runs["floor"] = whole.clone
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {one: float("inf") for one, run in runs.items() if run is not None}
    for turn in range(repeat + 1):
        for one, run in runs.items():
            if run is None:
                continue
            start = clock()
            kept = run()  # freed after the clock has stopped
            seconds = clock() - start
            del kept
            if turn:
                best[one] = min(best[one], seconds)
    ratios = {"clone / spec": best["clone"] / best["spec"], "floor / spec": best["floor"] / best["spec"]}
    bars = {"clone": ratios["clone / spec"] >= CLONE_BAR}
    if "peer" in best:
        ratios |= {"peer / spec": best["peer"] / best["spec"], "peer / to bf16": best["peer"] / best["to bf16"]}
        bars["peer"] = ratios["peer / spec"] >= PEER_BAR
    size = sum(t.nbytes for t in tensors.values())
    return {"case": name, "bytes": size, "seconds": best, "ratios": ratios, "bars": bars}


def planes(spec: LinearSpec) -> dict[str, Tensor]:
    assert isinstance(spec.weight, QTensor)
    return spec.weight.planes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*PACKED, *OTHERS], default=[*PACKED, *OTHERS], metavar="CASE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(options.only):
            folder = Path(scratch) / str(i)
            found.append(measure(name, options.rows, options.columns, options.repeat, folder))
            (folder / "model.safetensors").unlink()
    if options.json:
        print(json.dumps({"threads": options.threads, "cases": found}, indent=2))
    else:
        report(found)
    return 0 if all(all(one["bars"].values()) for one in found) else 1


def report(found: list[dict[str, Any]]) -> None:
    ways = ("get_tensor", "clone", "floor", "spec", "to bf16", "peer")
    print(
        f"{'ms':16}{'MB':>7}"
        + "".join(f"{way:>12}" for way in ways)
        + f"{'clone/spec':>12}{'floor/spec':>12}{'peer/spec':>11}  to bf16"
    )
    for one in found:
        cells = [f"{one['seconds'][way] * 1e3:12.2f}" if way in one["seconds"] else f"{'-':>12}" for way in ways]
        ratios = one["ratios"]
        against = (
            f"{ratios['peer / spec']:11.2f}{ratios['peer / to bf16']:9.2f}" if "peer" in one["bars"] else f"{'-':>11}"
        )
        missed = [f"MISSED {bar}" for bar, holds in one["bars"].items() if not holds]
        cells += [f"{ratios['clone / spec']:12.2f}", f"{ratios['floor / spec']:12.2f}", against]
        print(f"{one['case']:16}{one['bytes'] / 1e6:7.1f}{''.join(cells)}  {' '.join(missed)}")


if __name__ == "__main__":
    sys.exit(main())
