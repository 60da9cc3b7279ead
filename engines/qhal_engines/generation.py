"""Generates text with its speed, and computes perplexity, for any causal language model of transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """What came out and how fast.

    prefill_s                time to the first token, seconds
    decode_tokens_per_s      of the tokens after it, by the clock; 0.0 when there are none
    decode_tokens_per_cpu_s  the same per second of processor time of this process, all threads: what other programs on
                             the machine change least. It says nothing of a model that runs on an accelerator.
    stopped                  an end token came before the limit
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float
    decode_tokens_per_s: float
    decode_tokens_per_cpu_s: float
    stopped: bool


def chat_prompt(tokenizer: Any, message: str) -> str:
    """The message as one user turn of the tokenizer's chat template, or unchanged if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return message
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    on_token: Callable[[str], None] | None = None,
    stop_at_end: bool = True,
) -> Generation:
    """Greedy text after `prompt` (a finished string: see `chat_prompt`), made by the model's own `generate`.

    `on_token` gets every new piece of text as soon as it is whole (a character of several tokens is held back).
    With stop_at_end=False exactly max_new_tokens are made, which is what a speed measurement wants.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    ends = _end_tokens(model)
    clock = _Clock(tokenizer, on_token, ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    started = time.perf_counter()
    model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=None if stop_at_end else max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        streamer=clock,
    )
    made, seconds, cpu_seconds = clock.token_ids, clock.last - clock.first, clock.last_cpu - clock.first_cpu
    return Generation(
        text=tokenizer.decode(made, skip_special_tokens=True),
        token_ids=tuple(made),
        prompt_tokens=int(inputs.input_ids.shape[1]),
        prefill_s=clock.first - started,
        decode_tokens_per_s=(len(made) - 1) / seconds if seconds > 0 else 0.0,
        decode_tokens_per_cpu_s=(len(made) - 1) / cpu_seconds if cpu_seconds > 0 else 0.0,
        stopped=made[-1] in ends,
    )


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    windows: int = 6,
    length: int = 512,
    *,
    on_window: Callable[[int, float], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood (natural log) over `windows` consecutive, separate windows of `length`
    tokens.

    Each window's first token is context only, so windows * (length - 1) predictions count. Log-softmax in float32, sum
    in float64 on the host. `on_window` gets the number of windows done and the perplexity so far. Raises ValueError if
    the text is too short.
    """
    need = windows * length
    # The start of a long text is enough, and tokenizing all of it is slow.
    ids = tokenizer(text[: 16 * need], add_special_tokens=False, verbose=False).input_ids
    if len(ids) < need:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if windows < 1 or length < 2 or len(ids) < need:
        raise ValueError(f"{windows} windows of {length} tokens need {need} tokens; the text has {len(ids)}")
    total = 0.0
    for window in range(windows):
        part = torch.tensor(ids[window * length : (window + 1) * length], device=model.device)
        logits: Tensor = model(input_ids=part[None], use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), part[1:], reduction="sum").item()
        if on_window is not None:
            on_window(window + 1, math.exp(total / ((window + 1) * (length - 1))))
    return math.exp(total / (windows * (length - 1)))


class _Clock:
    """A streamer for `generate`: notes when tokens arrive and passes whole pieces of text on."""

    def __init__(self, tokenizer: Any, on_token: Callable[[str], None] | None, ends: frozenset[int]) -> None:
        self._tokenizer, self._on_token, self._ends = tokenizer, on_token, ends
        self._prompt = True
        self._shown = ""
        self.token_ids: list[int] = []
        self.first = self.last = self.first_cpu = self.last_cpu = 0.0

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt once, then with every new token."""
        if self._prompt:
            self._prompt = False
            return
        self.last, self.last_cpu = time.perf_counter(), time.process_time()
        if not self.token_ids:
            self.first, self.first_cpu = self.last, self.last_cpu
        self.token_ids.extend(value.flatten().tolist())
        if self._on_token is not None and self.token_ids[-1] not in self._ends:
            self._show(whole=False)

    def end(self) -> None:
        """Called by transformers after the last token."""
        if self._on_token is not None:
            self._show(whole=True)

    def _show(self, whole: bool) -> None:
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        if self._on_token is not None and len(text) > len(self._shown) and (whole or not text.endswith("\ufffd")):
            self._on_token(text[len(self._shown) :])
            self._shown = text


def _end_tokens(model: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None) or model.config
    end = config.eos_token_id
    return frozenset([end] if isinstance(end, int) else end or ())
