"""Makes the demo's bf16 Hugging Face checkpoint of SmolLM2-135M-Instruct, and fetches the text that measures it.

    python examples/demo/model.py [--cache build/demo]

Downloads happen once, every step is atomic, and a second run with everything in place needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fetch import MODEL, TEXT, DemoError, fetch, partial
from gguf_file import GgufError, GgufFile
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from qhal.errors import QhalError

DEFAULT_CACHE = Path(__file__).resolve().parents[2] / "build" / "demo"
_CONVERTER = 1  # part of the checkpoint's stamp: a new number makes old caches convert again
_CONTROL_TOKEN = 3
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
console = Console(stderr=True)


@dataclass(frozen=True)
class DemoFiles:
    """The folder of the bf16 checkpoint and the file of the perplexity text (UTF-8)."""

    checkpoint: Path
    text: Path


def prepare(cache: Path = DEFAULT_CACHE) -> DemoFiles:
    """Everything the demo starts from. Raises DemoError with what to do."""
    text = fetch(TEXT, cache)
    checkpoint = cache / "SmolLM2-135M-Instruct-bf16"
    stamp = checkpoint / "source.json"
    if not (stamp.exists() and json.loads(stamp.read_text()) == _stamp()):
        if checkpoint.exists():
            raise DemoError(
                f"{checkpoint} was not made by this version of the demo\n  expected in source.json {_stamp()}\n"
                f"  do: delete the folder and run again"
            )
        convert(fetch(MODEL, cache), checkpoint)
    return DemoFiles(checkpoint, text)


def convert(gguf: Path, out: Path) -> None:
    """Writes the folder `out`: model.safetensors (bf16, weights rounded once from the GGUF's exact float32 values),
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, source.json."""
    started = time.perf_counter()
    try:
        file = GgufFile(gguf)
        config = llama_config(file.metadata)
        weights = {}
        for entry in track(file.tensors.values(), "converting to bf16", console=console, transient=True):
            name = hf_name(entry.name)
            weights[name] = to_hf(name, file.read(entry.name), config).to(torch.bfloat16).contiguous()
    except (GgufError, KeyError) as error:
        raise DemoError(f"{gguf} cannot be converted: {error}\n  do: delete it and run again") from error
    with partial(out) as draft:
        draft.mkdir()
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        tokens = {k: file.metadata[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")}
        generation = {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], "pad_token_id": tokens["padding"]}
        tokenizer(file.metadata).save(str(draft / "tokenizer.json"))
        _write(draft / "tokenizer_config.json", tokenizer_config(file.metadata))
        _write(draft / "config.json", config)
        _write(draft / "generation_config.json", generation)
        _write(draft / "source.json", _stamp())
    console.print(f"converted {len(weights)} tensors to {out} in {time.perf_counter() - started:.1f} s", soft_wrap=True)


def hf_name(name: str) -> str:
    """The Hugging Face Llama name of a GGUF tensor name. Raises KeyError for a name the architecture does not have."""
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{int(layer)}.{_MODULES[module]}.{kind}"


def to_hf(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """Undoes llama.cpp's row order of query and key weights: it interleaves the two halves that rotary embedding pairs,
    [heads, half, 2] -> [heads, 2, half]. Other tensors are returned as they are."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.view(config[heads], rows // config[heads] // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model. The rope base stands both where transformers 4 and where transformers 5 look for it: a
    reader that misses it would use 10000 and be silently wrong."""
    if metadata.get("general.architecture") != "llama":
        raise GgufError(f"architecture {metadata.get('general.architecture')!r}, expected 'llama'")
    get = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    theta = get["rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": get["embedding_length"],
        "intermediate_size": get["feed_forward_length"],
        "num_hidden_layers": get["block_count"],
        "num_attention_heads": get["attention.head_count"],
        "num_key_value_heads": get["attention.head_count_kv"],
        "head_dim": get["rope.dimension_count"],
        "max_position_embeddings": get["context_length"],
        "vocab_size": get["vocab_size"],
        "rms_norm_eps": float(f"{get['attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with the GPT-2 split after every digit is split off: the rule that `tokenizer.ggml.pre = smollm`
    names."""
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"tokenizer {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    first, *rest = zip(*(merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]), strict=True)
    model = models.BPE({token: i for i, token in enumerate(tokens)}, list(zip(first, *rest, strict=True)))
    result = Tokenizer(model)
    digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    result.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    result.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL_TOKEN])
    return result


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json; its class reads tokenizer.json as it is in transformers 4 and 5."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()},
    }


def _stamp() -> dict[str, Any]:
    return {"gguf_sha256": MODEL.sha256, "converter": _CONVERTER}


def answered(make: Callable[[], dict[str, Any]], as_json: bool) -> int:
    """The exit code of an example, and its report as JSON if asked: 0, or 1 with one clear error."""
    try:
        report = make()
    except (DemoError, QhalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(report, indent=2))
    return 0


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Command line: prints the two paths as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder of downloads and results [build/demo]"
    )
    try:
        files = prepare(parser.parse_args().cache)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"checkpoint": str(files.checkpoint), "text": str(files.text)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
