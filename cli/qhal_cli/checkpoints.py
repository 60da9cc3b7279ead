"""`qhal plan`, `dequantize` and `quantize`: what would run of a checkpoint, and converting it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch import Tensor

import qhal
from qhal.elements import WIDE
from qhal.errors import PlanError
from qhal.plan import Policy
from qhal_cli.output import Folder, Json, console, emit, print_left, progress, size
from qhal_engines.kv_plan import plan_with_caches
from qhal_schemes import Checkpoint, open_checkpoint, quantize_checkpoint
from qhal_schemes.source import DTYPES
from qhal_schemes.writing import AtomicFile, StreamingSafetensors, TensorLayout, apart

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KVFormatOption = Annotated[
    str | None,
    typer.Option(help="Of the cache, else the checkpoint's own: fp8, int8, int4, nvfp4, any format name, or K,V."),
]


def plan(
    checkpoint: Folder,
    backend: Annotated[str, typer.Option(help="auto, a backend's name, or name:index.")] = "auto",
    arch: Annotated[str | None, typer.Option(help="Plan for this architecture with no device present.")] = None,
    policy: Annotated[str, typer.Option(help="exact, error, allow or report.")] = "error",
    world: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of the activations: bf16, fp16, fp32.")] = None,
    kv_format: KVFormatOption = None,
    json: Json = False,
) -> None:
    """What would execute for every layer and cache. Exits with 1 if the policy refuses.

    exact refuses every deviation, error refuses downgrades, allow runs and lists them, report only tells.

    Examples:
      qhal plan CKPT --backend cpu_reference --kv-format fp8
      qhal plan CKPT --backend NAME --arch ARCH --policy report --json
    """
    if policy not in get_args(Policy):
        raise typer.BadParameter(f"policy {policy!r}: choose one of {', '.join(get_args(Policy))}")
    ops = qhal.select(backend, arch=arch)
    chosen = None if dtype is None else _dtype(dtype)
    try:
        result = plan_with_caches(open_checkpoint(checkpoint), ops, policy, kv_format, dtype=chosen, world=world)  # type: ignore[arg-type]
    except PlanError as error:
        if not json:
            raise
        emit({"refused": str(error).splitlines()[0], "plan": _loaded(error.plan)})
        raise typer.Exit(1) from error
    typer.echo(result.explain("json" if json else "text"))


def _loaded(result: qhal.Plan) -> Any:
    import json

    return json.loads(result.explain("json"))


def dequantize(
    checkpoint: Folder,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    stored: Annotated[bool, typer.Option("--stored", help="As stored, in the rotated or scaled basis.")] = False,
    json: Json = False,
) -> None:
    """Write every weight as plain floats: `<module>.weight`, experts as `<prefix>.<e>.<proj>.weight`.

    The default is the effective weight (y = x @ w.T before activation quantization, online rotations folded in).
    Tensors that are not quantized are copied. The file appears complete or not at all.

    Examples:
      qhal dequantize CKPT --out weights.safetensors
      qhal dequantize CKPT --out stored.safetensors --dtype bfloat16 --stored
    """
    ckpt, chosen = open_checkpoint(checkpoint), _dtype(dtype)
    apart(out, checkpoint)
    layout = _dense_layout(ckpt, chosen)
    plain = {name: _plain_layout(ckpt, name, chosen) for name in ckpt.account.plain if name not in layout}
    needed = sum(one.nbytes for one in (*layout.values(), *plain.values()))
    with progress() as shown, AtomicFile(out, needed=needed) as file:
        task = shown.add_task("dequantizing", total=len(layout) + len(plain))
        with StreamingSafetensors(file.path, layout | plain) as target:
            for name, value in _dense_tensors(ckpt, stored):
                target.write(name, value.to(chosen))
                shown.advance(task)
            for name in plain:
                value = ckpt.tensor(name)
                target.write(name, value.to(chosen) if value.is_floating_point() else value)
                shown.advance(task)
    record = {
        "out": str(out),
        "tensors": len(layout) + len(plain),
        "dequantized": len(layout),
        "bytes": needed,
        "dtype": str(chosen).removeprefix("torch."),
        "stored": stored,
    }
    if json:
        emit(record)
    else:
        console.print(f"{out}: {len(layout)} weights dequantized, {len(plain)} tensors copied, {size(needed)}")


def _dense_layout(ckpt: Checkpoint, dtype: torch.dtype) -> dict[str, TensorLayout]:
    """Weights and biases of the quantized modules, as plain floats."""
    shapes = {m: (f.n, f.k, f.bias) for m in _single(ckpt) for f in (ckpt.format(m),)}
    for prefix, group in ckpt.stacked.items():
        f = ckpt.experts_format(prefix)
        halves = {"gate_proj": (f.down.k, f.gate_up), "up_proj": (f.down.k, f.gate_up), "down_proj": (f.down.n, f.down)}
        for e in range(group.count):
            shapes |= {f"{prefix}.{e}.{name}": (n, part.k, part.bias) for name, (n, part) in halves.items()}
    found = {}
    for module, (n, k, bias) in shapes.items():
        found[f"{module}.weight"] = TensorLayout(_NAMES[dtype], (n, k))
        if bias:
            found[f"{module}.bias"] = TensorLayout(_NAMES[dtype], (n,))
    return found


def _dense_tensors(ckpt: Checkpoint, stored: bool) -> Iterator[tuple[str, Tensor]]:
    """The values of `_dense_layout`, one module or expert in memory at a time."""
    for module in _single(ckpt):
        spec = ckpt.spec(module)
        yield f"{module}.weight", spec.stored() if stored else spec.effective()
        if spec.bias is not None:  # a stored bias stands before an output rotation, the spec's behind it
            yield f"{module}.bias", ckpt.tensor(f"{module}.bias") if stored else spec.bias
    for prefix, e in ((p, e) for p, group in ckpt.stacked.items() for e in range(group.count)):
        experts = ckpt.experts_spec(prefix, (e, 1))
        for part, names in ((experts.gate_up, ("gate_proj", "up_proj")), (experts.down, ("down_proj",))):
            weight = part.stored() if stored else part.effective()
            for name, w in zip(names, weight[0].chunk(len(names)), strict=True):
                yield f"{prefix}.{e}.{name}.weight", w
            if part.bias is not None:
                for name, b in zip(names, part.bias[0].chunk(len(names)), strict=True):
                    yield f"{prefix}.{e}.{name}.bias", b


def _single(ckpt: Checkpoint) -> list[str]:
    """Quantized modules that are one layer each."""
    stacked = {m for group in ckpt.stacked.values() for m in group.modules()}
    return [m for m in ckpt.modules(quantized=True) if m not in stacked]


def _plain_layout(ckpt: Checkpoint, name: str, dtype: torch.dtype) -> TensorLayout:
    entry = ckpt.entry(name)
    return TensorLayout(_NAMES[dtype] if DTYPES[entry.dtype].is_floating_point else entry.dtype, entry.shape)


def quantize(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder with float weights.")],
    format: Annotated[str, typer.Option(help="int4_g32, int8, fp8, or any format name: int4.g32*bf16@qmax=7.5")],
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    ignore: Annotated[
        list[str] | None, typer.Option(help="Names or re: patterns to leave alone; default: lm_head.")
    ] = None,
    json: Json = False,
) -> None:
    """Round to nearest into a standard compressed-tensors checkpoint: the bits of open_checkpoint(quantize=FORMAT).

    Examples:
      qhal quantize bf16/ --format int4_g32 --out int4/
      qhal quantize bf16/ --format int8 --out int8/ --ignore lm_head --ignore model.layers.0.mlp.down_proj
    """
    with progress() as shown:
        task = shown.add_task("quantizing", total=None)

        def advance(done: int, total: int, name: str) -> None:
            shown.update(task, completed=done, total=total, description=name)

        summary = quantize_checkpoint(source, out, format, ignore=ignore or ("lm_head",), progress=advance)
    if json:
        emit(summary)
    else:
        print_left(summary["left"])
        console.print(
            f"{out}: {summary['modules']} modules as {summary['format']}, input {summary['input'] or 'not quantized'}, "
            f"{size(summary['source_bytes'])} became {size(summary['bytes'])}"
        )


def _dtype(name: str) -> torch.dtype:
    names = {**WIDE, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise typer.BadParameter(f"dtype {name!r}: choose one of {', '.join(names)}")
    return names[name]
