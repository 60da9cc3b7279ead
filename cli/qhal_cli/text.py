"""`qhal generate`: text from a quantized checkpoint through an engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import qhal
from qhal.errors import CheckpointError, QhalError
from qhal_cli.checkpoints import KVFormatOption
from qhal_cli.output import Json, emit, stderr


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder with config.json and a tokenizer.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, or the question to ask.")],
    backend: Annotated[str, typer.Option(help="auto, a backend's name, or name:index.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    policy: Annotated[str, typer.Option(help="exact, error or allow; see `qhal plan`.")] = "error",
    kv_format: KVFormatOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")] = False,
    json: Json = False,
) -> None:
    """Select, plan, load and generate, as an engine would; the text streams as it is made.

    Examples:
      qhal generate build/demo/int4 --prompt "What is the capital of France?"
      qhal generate CKPT --prompt "Hello" --backend cpu_reference --kv-format fp8 --json
    """
    if policy not in ("exact", "error", "allow"):
        raise typer.BadParameter(f"policy {policy!r}: generating runs the model, so choose exact, error or allow")
    if checkpoint.suffix == ".gguf":
        raise CheckpointError(
            f"unsupported: {checkpoint}: text from a single file; `qhal inspect`, `plan` and `dequantize` read it"
        )
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint folder: it has no config.json")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qhal_engines import transformers as engine
    from qhal_engines.generation import chat_prompt
    from qhal_engines.generation import generate as run
    from qhal_engines.kv_attach import cache_name
    from qhal_engines.loading import arguments

    qhal.select(backend)  # before anything is read: is there such a backend at all
    engine.install(backend, policy, kv_format)  # type: ignore[arg-type]  # it checks the policy itself
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **arguments(checkpoint, kv_format))
    except (OSError, ValueError) as error:
        if isinstance(error, QhalError):
            raise
        raise CheckpointError(f"{checkpoint}: transformers cannot load it: {error}") from error
    text = prompt if raw else chat_prompt(tokenizer, prompt)
    result = run(model, tokenizer, text, max_new_tokens, on_token=None if json else _show)
    plan = getattr(model, "qhal_plan", None)
    if json:
        emit(asdict(result) | {"plan": None if plan is None else plan.digest, "cache": cache_name(model)})
        return
    typer.echo()
    ran = "no plan: the checkpoint is not quantized" if plan is None else f"plan {plan.digest} on {plan.backend}"
    ran += f", cache {cache}" if (cache := cache_name(model)) else ""
    stderr.print(
        f"{len(result.token_ids)} tokens, {result.decode_tokens_per_s:.1f} tokens/s after the first, {ran}",
        soft_wrap=True,
    )


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
