"""A whole model in transformers: its linear layers on an emulated generation, the rest of it as torch computes it.

Judged are the products of the first window: on its first `ROWS` tokens every output of every quantized linear layer is
within its class of the exact product of the codes of the input that the layer met there. Layers that follow another
rule than the checkpoint's, as their plan says, are counted and not judged. Told, and not judged, is how far the
model is from the same one on `cpu_reference`: logits and perplexity. What is rounded otherwise in one layer meets other
roundings, and other int8 codes, in the next, so that there is no bound to compute for these; how far `cpu_reference` is
from itself with float32 activations stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qhal_npu_emulation as emulation
import qhal_schemes
from qhal_engines import EngineError, EngineMissingError
from qhal_npu_emulation import library
from qhal_npu_emulation.golden import bound, product

COMMITTED = Path(__file__).parents[4] / "tests" / "golden" / "modelslim" / "command_mixed" / "checkpoint"
"""Two layers, quantized by `msmodelslim quant` in three schemes; 64 words."""
ROWS = 64
REFERENCE = "cpu_reference"
Done = Callable[[str, int], None]


def text_ids(folder: Path, text: Path, *, skip: int, windows: int, length: int) -> Tensor:
    """int64 [windows, length] of the text (UTF-8) after its first `skip` characters.

    Raises EngineError without a tokenizer, ValueError if the text is too short.
    """
    _transformers()
    from transformers import AutoTokenizer

    words = text.read_text(encoding="utf-8")[skip:]
    need = windows * length
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{folder}: no tokenizer that transformers can read; do: put the model's tokenizer.json and "
            "tokenizer_config.json there"
        ) from error
    ids = tokenizer(words[: 16 * need], add_special_tokens=False, verbose=False).input_ids
    if windows < 1 or length < 2 or len(ids) < need:
        raise ValueError(f"{windows} windows of {length} tokens need {need} tokens; {text} has {len(ids)}")
    return torch.tensor(ids[:need]).reshape(windows, length)


@torch.inference_mode()
def run(folder: Path, archs: tuple[str, ...], ids: Tensor, on_window: Done | None = None) -> list[dict[str, Any]]:
    """One row per generation, over the windows `ids` [windows, length]. Raises QhalError for what cannot run there."""
    if not qhal_schemes.open_checkpoint(folder).modules(quantized=True):
        raise EngineError(f"{folder}: no linear layer is quantized; do: name a quantized checkpoint")
    _transformers()
    show = on_window or (lambda backend, done: None)
    right = _logits(load(folder, REFERENCE), ids, partial(show, REFERENCE))
    itself = _distance(right[:1], _logits(load(folder, REFERENCE, torch.float32), ids[:1]))
    rows = []
    for arch in archs:
        model = load(folder, emulation.name(arch))
        statuses = [(e.status, len(e.layers)) for e in model.qhal_plan.entries]
        products = _judged(model, folder, ids[:1])
        got = _logits(model, ids, partial(show, arch))
        found = {
            "case": folder.parent.name if folder.name == "checkpoint" else folder.name,
            "arch": arch,
            "plan": {word: sum(n for s, n in statuses if s == word) for word in sorted({s for s, _ in statuses})},
            "products": products,
            "perplexity": {arch: _perplexity(got, ids), REFERENCE: _perplexity(right, ids)},
            "logits": {
                "distance": _distance(got, right),
                "reference_in_float32": itself,
                "same_token": float((got.argmax(-1) == right.argmax(-1)).double().mean()),
            },
        }
        rows.append(found)
    return rows


def committed() -> list[dict[str, Any]]:
    """The checkpoint that comes with the tests, on every generation."""
    return run(COMMITTED, emulation.ARCHS, (torch.arange(96) * 29 % 64).reshape(2, 48))


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    p, arch, logits = row["products"], row["arch"], row["logits"]
    mine, right = row["perplexity"][arch], row["perplexity"][REFERENCE]
    rule = f", {p['by_rule']} by another rule" if p["by_rule"] else ""
    return (
        f"{arch}: {p['within']} of {p['outputs']} layers within their bound (worst {p['worst']:.2f} of it){rule}; "
        f"perplexity {mine:.3f}, {REFERENCE} {right:.3f}, ratio {mine / right:.5f}; logits {logits['distance']:.1e} "
        f"apart, where {REFERENCE} in float32 is {logits['reference_in_float32']:.1e} from itself"
    )


def load(folder: Path, backend: str, dtype: torch.dtype | str = "auto") -> Any:
    """The model in transformers, its quantized layers on `backend`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from qhal_engines import loading
    from qhal_engines.transformers import install

    logging.disable_progress_bar()
    install(backend)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading.arguments(folder)).eval()


def _transformers() -> None:
    """Makes transformers importable: it imports torch_npu where that is installed, which needs the stand-ins first."""
    if find_spec("transformers") is None:
        raise EngineMissingError(
            "a whole model runs in transformers, which is not installed here; do: make .venv-npu/.installed"
        )
    library.install()


def _judged(model: Any, folder: Path, ids: Tensor) -> dict[str, Any]:
    """Runs one window and holds every quantized layer to the exact product of what it met."""
    from qhal_engines.modules import QhalLinear

    checkpoint = qhal_schemes.open_checkpoint(folder)
    support = {name: e.support for e in model.qhal_plan.entries for name in e.layers}
    found: dict[str, Any] = {"outputs": 0, "within": 0, "worst": 0.0, "by_rule": 0}

    def judge(module: QhalLinear, given: tuple[Tensor, ...], y: Tensor) -> None:
        if support[module.name].rule is not None:
            found["by_rule"] += 1
            return
        spec, numerics = checkpoint.linear_spec(module.name), support[module.name].numerics
        x, y = (t.flatten(0, -2) for t in (given[0], y))
        exact, size = product(spec, x, decode=False)
        room = bound(numerics, exact, size, x.shape[-1], y.dtype).clamp_min(1e-30)
        worst = float(((y.double() - exact).abs() / room).max())
        found["outputs"] += 1
        found["within"] += worst <= 1
        found["worst"] = round(max(found["worst"], worst), 3)

    hooks = [m.register_forward_hook(judge) for m in model.modules() if isinstance(m, QhalLinear)]
    model(input_ids=ids[:, :ROWS], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _logits(model: Any, ids: Tensor, show: Callable[[int], None] | None = None) -> Tensor:
    """float32 [windows, length - 1, tokens of the vocabulary], each window by itself."""
    made = []
    for i, window in enumerate(ids):
        made.append(model(input_ids=window[None], use_cache=False).logits[0, :-1].float())
        if show is not None:
            show(i + 1)
    return torch.stack(made)


def _distance(got: Tensor, right: Tensor) -> float:
    """The length of the difference, relative."""
    return float((got - right).norm() / right.norm())


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
