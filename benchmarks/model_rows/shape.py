"""The model that is measured, in sizes: a Llama with grouped-query attention, 7 billion parameters by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and how it is used.

    context       tokens that the last decoded token sees, itself included
    batches       sequences that decode together, one run each
    prompt        tokens of the measured prefill
    checked       tokens of the prompt whose results are compared with the definition
    steps         decoded tokens that are timed
    """

    layers: int = 32
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 32000
    context: int = 1024
    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 2048
    checked: int = 256
    steps: int = 16
    page: int = 16
    eps: float = 1e-5

    @property
    def qkv(self) -> int:
        """Rows of q, k and v together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def pages(self) -> int:
        """Pages of one sequence of the largest batch."""
        return -(-self.context // self.page)

    @property
    def whole(self) -> bool:
        """Whether it is the model whose tokens per second are those of 7 billion parameters."""
        return (self.layers, self.hidden, self.ffn, self.vocab) == (32, 4096, 14336, 32000)

    def products(self, *, fused: bool) -> dict[str, tuple[int, int]]:
        """(N, K) of every product of a layer; fused: what reads the same input is one product."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if fused:
            first = {"qkv": (self.qkv, self.hidden)}
            wide = {"gate_up": (2 * self.ffn, self.hidden)}
        else:
            first = {name: (rows, self.hidden) for name, rows in (("q", q), ("k", kv), ("v", kv))}
            wide = dict.fromkeys(("gate", "up"), (self.ffn, self.hidden))
        return {**first, "o": (self.hidden, q), **wide, "down": (self.hidden, self.ffn)}
