"""The models in GGUF files: which transformers' name a tensor has, in which order its rows lie, what config.json says.

Row order. transformers rotates the two halves of a head against each other, the kernels of some architectures rotate
neighbours. For these llama.cpp's converter interleaves the halves of every head of Q and K, [heads, 2, d/2] to
[heads, d/2, 2] (conversion/llama.py, permute); `row_order` undoes it.

A file whose metadata do not describe one of `ARCHITECTURES` keeps its own names and row order. Of the position
encoding only the base is translated: config.json of the original model has the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qhal_schemes.gguf_file import Array, GGUFHeader

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{f"ffn_{stem}{end}": f"block_sparse_moe.experts.{{e}}.{leaf}"
       for stem, leaf in (("gate", "w1"), ("up", "w3"), ("down", "w2")) for end in ("", "_exps")},
}  # fmt: skip
_BUFFERS = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short"})
"""Factors of the position encoding: names that stay."""


@dataclass(frozen=True)
class Architecture:
    """model_type of transformers, its module names in a layer, and whether rows of Q and K are interleaved."""

    model_type: str
    names: dict[str, str]
    interleaved: bool = False
    keys: dict[str, str] = field(default_factory=dict)


_QWEN_MOE = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size",
             "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}  # fmt: skip
ARCHITECTURES = {
    "llama": Architecture("llama", _ATTENTION | _DENSE, interleaved=True),
    "smollm3": Architecture("smollm3", _ATTENTION | _DENSE, interleaved=True),
    "qwen2": Architecture("qwen2", _ATTENTION | _DENSE),
    "qwen3": Architecture("qwen3", _ATTENTION | _DENSE),
    "qwen2moe": Architecture("qwen2_moe", _ATTENTION | _DENSE | _MOE, keys=_QWEN_MOE),
    "qwen3moe": Architecture("qwen3_moe", _ATTENTION | _DENSE | _MOE, keys=_QWEN_MOE),
    "phi3": Architecture("phi3", _ATTENTION | _FUSED),
}
"""Architectures by general.architecture."""
_MIXTRAL_MODEL = Architecture(
    "mixtral", _ATTENTION | _MIXTRAL, interleaved=True, keys={"expert_count": "num_local_experts"}
)
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "expert_used_count": "num_experts_per_tok",
}
_NEEDED = ("block_count", "embedding_length", "attention.head_count")
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(\w+?)(?:\.(\d{1,9}))?\.(weight|bias)$")
_EXPERTS = re.compile(r"blk\.\d{1,9}\.\w+_exps\.weight$")


def stacks_experts(name: str) -> bool:
    """Whether a tensor of the file holds the same weight of every expert, [E, N, K]."""
    return _EXPERTS.match(name) is not None


@dataclass(frozen=True)
class Names:
    """The names of one file. model: None where its own names stay, and why."""

    header: GGUFHeader
    model: Architecture | None
    why: str = ""

    @staticmethod
    def of(header: GGUFHeader) -> Names:
        """The architecture that the metadata describe."""
        name = header.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise header.bad("general.architecture", "the name of an architecture", name)
        model = ARCHITECTURES.get(name)
        if model is None:
            return Names(header, None, f"architecture {name[:80]!r} is not known here ({', '.join(ARCHITECTURES)} are)")
        missing = [f"{name}.{key}" for key in _NEEDED if f"{name}.{key}" not in header.metadata]
        if missing:
            return Names(header, None, f"the metadata describe no model: {', '.join(missing)} are missing")
        return Names(header, _MIXTRAL_MODEL if name == "llama" and header.count("llama.expert_count") else model)

    def of_tensor(self, name: str) -> str | None:
        """transformers' name of a tensor of the file, with "{e}" for the number of the expert; None: no such tensor."""
        if self.model is None:
            return f"{name.removesuffix('.weight')}.{{e}}.weight" if stacks_experts(name) else name
        stem, _, leaf = name.rpartition(".")
        if stem in _BUFFERS or stem in _TOP:
            return name if stem in _BUFFERS else f"{_TOP[stem]}.{leaf}"
        found = _BLOCK.match(name)
        if found is None:
            return None
        layer, part, expert, leaf = found.groups()
        if int(layer) >= (self.header.count(f"{self.header.metadata['general.architecture']}.block_count") or 0):
            return None
        if part in _BUFFERS:
            return name
        module = self.model.names.get(part)
        stacked = module is not None and "{e}" in module
        if module is None or stacked == (expert is None and not stacks_experts(name)) or (expert and not stacked):
            return None
        return f"model.layers.{int(layer)}.{module if expert is None else module.format(e=int(expert))}.{leaf}"

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """int64 [rows]: row i of the model is row order[i] of the file's tensor; None: they are the same."""
        found = _BLOCK.match(name)
        if self.model is None or not self.model.interleaved or found is None or found[2] not in ("attn_q", "attn_k"):
            return None
        layer = int(found[1])
        heads, size = self._heads(found[2] == "attn_k", layer), self._head_dim(layer)
        if rows != heads * size or size % 2:
            raise self.header.bad(name, f"rows of {heads} heads of {size} (an even number)", f"{rows} rows")
        return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)

    def _heads(self, of_keys: bool, layer: int) -> int:
        """Heads of Q or K in a layer."""
        prefix = self.header.metadata["general.architecture"]
        key = f"{prefix}.attention.head_count"
        key = f"{key}_kv" if of_keys and f"{key}_kv" in self.header.metadata else key
        value = self.header.metadata[key]
        if isinstance(value, Array):
            value = value.values[layer] if value.values is not None and layer < len(value.values) else None
        if type(value) is not int or not 0 < value < 1 << 16:
            raise self.header.bad(key, f"a number of heads for layer {layer}", value)
        return value

    def _head_dim(self, layer: int) -> int:
        """Features of a head of Q and K; where an architecture is interleaved, all of them are rotated."""
        prefix = self.header.metadata["general.architecture"]
        width = self.header.count(f"{prefix}.embedding_length")
        size = self.header.count(f"{prefix}.attention.key_length") or (width or 0) // self._heads(False, layer)
        rotated = self.header.count(f"{prefix}.rope.dimension_count")
        if rotated not in (None, size):
            raise self.header.bad(f"{prefix}.rope.dimension_count", f"{size}, the size of a head", rotated)
        return size

    def config(self) -> dict[str, Any]:
        """What config.json would say of the model; {} where its own names stay."""
        if self.model is None:
            return {}
        header, prefix = self.header, self.header.metadata["general.architecture"]
        found: dict[str, Any] = {"model_type": self.model.model_type, "hidden_act": "silu"}
        for key, name in (_KEYS | self.model.keys).items():
            value = header.count(f"{prefix}.{key}")
            if value is not None:
                found[name] = value
        found["num_attention_heads"] = self._heads(False, 0)
        found["num_key_value_heads"] = self._heads(True, 0)
        head_dim = header.count(f"{prefix}.attention.key_length") or header.count(f"{prefix}.rope.dimension_count")
        if head_dim is not None:
            found["head_dim"] = head_dim
        for key, name in (("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")):
            value = header.metadata.get(f"{prefix}.{key}")
            if value is not None and (type(value) is not float or not 0 < value < float("inf")):
                raise header.bad(f"{prefix}.{key}", "a positive number", value)
            if value is not None:
                found[name] = float(f"{value:.7g}")  # the shortest number of this float32
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Array):
            found.setdefault("vocab_size", tokens.count)
        found["tie_word_embeddings"] = "output.weight" not in header.tensors
        return found
