"""`qhal inspect`, `plan`, `dequantize` and `quantize`: what a checkpoint is, what would run, and converting it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import qhal
from qhal.elements import WIDE
from qhal.errors import FormatError, PlanError
from qhal_cli.output import Json, console, emit, progress, size, table
from qhal_schemes import Checkpoint, open_checkpoint, quantize_checkpoint
from qhal_schemes.writing import write_safetensors

Folder = Annotated[Path, typer.Argument(help="A checkpoint folder: config.json and safetensors.")]


def inspect(checkpoint: Folder, json: Json = False) -> None:
    """What is quantized how, what is excluded by which rule, and where every tensor went. Reads no weights.

    Examples:
      qhal inspect path/to/checkpoint
      qhal inspect path/to/checkpoint --json | jq .totals
    """
    record = open_checkpoint(checkpoint).summary()
    if json:
        emit(record)
        return
    total = record["totals"]
    console.print(f"[bold]{record['path']}[/bold]: {record['method']}, activations {record['dtype']}")
    rows = (
        (r["weight"], r["input"], r["modules"], f"{r['weights']:,}", size(r["bytes"]), _bits(r))
        for r in record["formats"]
    )
    table("Quantized modules", ("weight", "input", "modules", "weights", "bytes", "bits per weight"), rows)
    if record["excluded"]:
        table(
            "Plain modules",
            ("rule", "modules", "first"),
            ((r["rule"], len(r["modules"]), r["modules"][0]) for r in record["excluded"]),
        )
    for r in record["experts"]:
        console.print(f"experts: {r['prefix']} ({r['experts']})")
    for r in record["kv"]:
        console.print(f"cache: {r['format']} in {r['layers']} layers")
    if record["extra"]:
        table("Tensors that nothing uses", ("tensor", "why"), ((r["tensor"], r["why"]) for r in record["extra"]))
    console.print(
        f"{total['tensors']} tensors, {size(total['bytes'])}: {total['consumed']} in quantized modules, "
        f"{total['plain']} plain, {total['extra']} unused"
    )


def _bits(row: dict[str, Any]) -> str:
    return f"{8 * row['bytes'] / row['weights']:.2f}" if row["weights"] else "-"


def plan(
    checkpoint: Folder,
    backend: Annotated[str, typer.Option(help="auto, a backend's name, or name:index.")] = "auto",
    arch: Annotated[str | None, typer.Option(help="Plan for this architecture with no device present.")] = None,
    policy: Annotated[str, typer.Option(help="exact, error, allow or report.")] = "error",
    world: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of the activations: bf16, fp16, fp32.")] = None,
    json: Json = False,
) -> None:
    """What would execute for every layer. Exits with 1 if the policy refuses.

    exact refuses every deviation, error refuses downgrades, allow runs and lists them, report only tells.

    Examples:
      qhal plan CKPT --backend cpu_reference
      qhal plan CKPT --backend NAME --arch ARCH --policy report --json
    """
    ops = qhal.select(backend, arch=arch)
    chosen = None if dtype is None else _dtype(dtype)
    try:
        result = qhal.resolve(open_checkpoint(checkpoint), ops, policy=policy, world=world, dtype=chosen)  # type: ignore[arg-type]
    except ValueError as error:
        if isinstance(error, qhal.QhalError):
            raise
        raise typer.BadParameter(str(error)) from error
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
    names = [*ckpt.modules(quantized=True), *ckpt.account.plain]
    shapes = {f"{m}.weight": _shape(ckpt, m) for m in ckpt.modules(quantized=True)}
    with progress() as shown:
        task = shown.add_task("dequantizing", total=len(names))

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for module in ckpt.modules(quantized=True):
                yield f"{module}.weight", (ckpt.stored(module) if stored else ckpt.dequantize(module)).to(chosen)
                shown.advance(task)

        written = write_safetensors(out, shapes, chosen, tensors())
    if json:
        emit({"out": str(out), "tensors": len(shapes), "bytes": written, "dtype": str(chosen), "stored": stored})
    else:
        console.print(f"{out}: {len(shapes)} tensors, {size(written)}")


def _shape(ckpt: Checkpoint, module: str) -> tuple[int, int]:
    f = ckpt.format(module)
    return f.n, f.k


def quantize(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder with float weights.")],
    format: Annotated[str, typer.Option(help="int4_g32, int8, fp8, or any format name: int4.g32*bf16@qmax=7.5")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave alone; repeatable.")] = None,
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

        extra = {} if ignore is None else {"ignore": tuple(ignore)}
        summary = quantize_checkpoint(source, out, format, progress=advance, **extra)
    if json:
        emit(summary)
    else:
        console.print(f"{out}: {summary}")


def _dtype(name: str) -> torch.dtype:
    names = {**WIDE, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise FormatError(f"dtype {name!r}: choose one of {', '.join(names)}")
    return names[name]
