"""Peak memory while loading a checkpoint: at most 1.25 x the final size + the largest module.

    python benchmarks/load_memory.py [--json] [--layers N] [--only CASE ...]

Each case loads every Linear module of a synthetic checkpoint (built once, in build/load_memory) on the CPU reference in
a process of its own. Peak: resident high-water mark less the resident size after all imports and one layer's warm-up.
Final size: bytes of all tensors that the prepared layers keep. Largest module: its weight in the model's dtype, bf16.
Exits with 1 if a ratio is above the bar.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from qhal_schemes import open_checkpoint
from qhal_schemes.compressed_tensors_writer import tensor_layouts
from qhal_schemes.quantizing import resolve_format
from qhal_schemes.source import DTYPES
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, TensorLayout

BAR = 1.25
BUILD = Path(__file__).resolve().parents[1] / "build" / "load_memory"
HIDDEN, INNER = 2048, 5632
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (512, HIDDEN),
    "self_attn.v_proj": (512, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CASES: dict[str, tuple[str | None, str | None]] = {  # name: format on disk, format to quantize to on the way in
    "int4_g32": ("int4_g32", None),
    "int8": ("int8", None),
    "fp8_row": ("fp8_row", None),
    "bf16 to int4_g32": (None, "int4_g32"),
    "bf16 to int8": (None, "int8"),
}


def checkpoint(stored: str | None, layers: int) -> Path:
    """A folder with random codes and scales in the layout of a format (None: random bf16 weights)."""
    folder = BUILD / f"{stored or 'bf16'}-{layers}"
    if folder.exists():
        return folder
    layout = resolve_format(stored, torch.bfloat16) if stored else None
    header: dict[str, TensorLayout] = {}
    for i in range(layers):
        for name, (n, k) in SHAPES.items():
            module = f"model.layers.{i}.{name}"
            plain = {f"{module}.weight": TensorLayout("BF16", (n, k))}
            header |= tensor_layouts(module, n, k, layout) if layout else plain
    config = {"model_type": "llama", "dtype": "bfloat16", "num_hidden_layers": layers, "tie_word_embeddings": True}
    if layout:
        config["quantization_config"] = layout.section(["lm_head"])  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    total = sum(one.nbytes for one in header.values())
    with AtomicDirectory(folder, needed=total) as out:
        (out.path / "config.json").write_text(json.dumps(config))
        with StreamingSafetensors(out.path / "model.safetensors", header) as file:
            for name, one in header.items():
                file.write(name, random_tensor(name, one, generator))
    return folder


def random_tensor(name: str, one: TensorLayout, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("weight_shape"):
        n, k = SHAPES[name.split(".", 3)[3].removesuffix(".weight_shape")]
        return torch.tensor([n, k])
    dtype = DTYPES[one.dtype]
    if dtype.is_floating_point and dtype.itemsize > 1:
        spread = torch.rand(one.shape, generator=generator) - 0.5
        return (spread.abs() * 0.01 + 0.001 if name.endswith("_scale") else spread * 0.1).to(dtype)
    count = one.nbytes
    raw = torch.randint(0, 127, (count,), dtype=torch.uint8, generator=generator)  # no float8 NaN
    return raw.view(dtype).reshape(one.shape)


def measure(folder: Path, quantize: str | None) -> dict[str, float]:
    """Load everything; bytes. Runs in a fresh process."""
    import qhal
    import qhal.layers

    torch.set_num_threads(1)
    ops = qhal.select("cpu_reference")
    ckpt = open_checkpoint(folder, quantize=quantize)
    modules = ckpt.modules(quantized=True)
    smallest = min(modules, key=lambda m: ckpt.format(m).n * ckpt.format(m).k)
    x = torch.zeros(1, ckpt.format(smallest).k, dtype=ckpt.dtype)
    ckpt.load_linear(smallest, ops)(x)
    before = resident("VmRSS")
    layers = [ckpt.load_linear(m, ops) for m in modules]
    peak = resident("VmHWM") - before
    largest = max(ckpt.format(m).n * ckpt.format(m).k for m in modules) * ckpt.dtype.itemsize
    return {"peak": peak, "final": sum(layer.nbytes for layer in layers), "largest": largest, "modules": len(layers)}


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: this benchmark needs Linux")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the synthetic checkpoint")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Path(options.child[0]), options.child[1] or None)))
        return 0
    rows = []
    for case in options.only:
        stored, quantize = CASES[case]
        folder = checkpoint(stored, options.layers)
        command = [sys.executable, __file__, "--child", str(folder), quantize or ""]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        ratio = (found["peak"] - found["largest"]) / found["final"]
        rows.append({"case": case, **found, "ratio": ratio, "bar": BAR, "holds": ratio <= BAR})
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'case':20} {'peak MB':>9} {'final MB':>9} {'largest MB':>11} {'(peak-largest)/final':>21}  bar {BAR}")
        for row in rows:
            sizes = [float(row[key]) / 1e6 for key in ("peak", "final", "largest")]
            verdict = "ok" if row["holds"] else "MISSED"
            print(f"{row['case']:20} {sizes[0]:9.1f} {sizes[1]:9.1f} {sizes[2]:11.1f} {row['ratio']:21.3f}  {verdict}")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
