"""Generation, perplexity, and the process that measures a model: the numbers and texts are what they say they are."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import qhal_engines.transformers as adapter  # noqa: E402
from qhal_engines import EngineError  # noqa: E402
from qhal_engines.generation import chat_prompt, generate, perplexity  # noqa: E402
from qhal_engines.measure import Worker  # noqa: E402


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install("cpu_reference")
    yield
    adapter.uninstall()


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A one-layer quantized Llama with a tokenizer of its own."""
    for path in (golden / "compressed_tensors" / "w4a16_g128_sym" / "checkpoint").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_tokenizer(tmp_path)
    return tmp_path


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "</s>", *("Ġ." + string.ascii_letters)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)


def test_generation_streams_the_text_it_returns(installed: None, folder: Path) -> None:
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pieces: list[str] = []
    made = generate(model, tokenizer, chat_prompt(tokenizer, "abc"), 12, on_token=pieces.append, stop_at_end=False)
    assert len(made.token_ids) == 12 and made.prompt_tokens == 3 and made.decode_tokens_per_s > 0
    assert "".join(pieces) == made.text
    again = generate(model, tokenizer, "abc", 12, stop_at_end=False)
    assert again.token_ids == made.token_ids
    expected = model.generate(
        **tokenizer("abc", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert tuple(expected[0, 3:].tolist()) == made.token_ids[:5]
    for arguments in (("abc", 0), ("", 3)):
        with pytest.raises(ValueError, match=r"at least 1|no tokens"):
            generate(model, tokenizer, *arguments)


@torch.inference_mode()
def test_perplexity_is_the_mean_over_separate_windows(installed: None, folder: Path) -> None:
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "the quick brown fox jumps over the lazy dog. " * 4
    seen: list[tuple[int, float]] = []
    value = perplexity(model, tokenizer, text, windows=2, length=16, on_window=lambda *done: seen.append(done))
    ids = torch.tensor(tokenizer(text).input_ids)
    terms = []
    for window in (ids[:16], ids[16:32]):
        logs = model(window[None]).logits[0].float().log_softmax(-1)
        terms += [-logs[i, window[i + 1]].item() for i in range(15)]
    assert value == pytest.approx(torch.tensor(terms).double().mean().exp().item(), rel=1e-5)
    assert [done for done, _ in seen] == [1, 2] and seen[-1][1] == value
    with pytest.raises(ValueError, match="need 1000 tokens"):
        perplexity(model, tokenizer, text, windows=10, length=100)


def test_a_worker_measures_in_its_own_process(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    pieces: list[dict[str, Any]] = []
    with Worker(folder, backend="cpu_reference", threads=1) as worker:
        loaded = worker.load()
        assert loaded["load_s"] > 0 and loaded["before_bytes"] <= loaded["load_peak_bytes"] <= worker.peak()
        assert worker.perplexity(text, windows=2, length=16)["perplexity"] > 1
        made = worker.generate("abc", tokens=4, chat=False, on_event=pieces.append)
        assert "".join(piece["text"] for piece in pieces) == made["text"]
        with pytest.raises(EngineError, match="need 1000 tokens"):
            worker.perplexity(text, windows=10, length=100)


def test_a_worker_loads_what_config_json_does_not_lead_to(tmp_path: Path) -> None:
    """ModelSlim says in a file of its own how weights are quantized, and names its weight files otherwise."""
    shutil.copytree(golden_cases.path("modelslim/command_mixed") / "checkpoint", tmp_path / "slim")
    write_tokenizer(tmp_path / "slim")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    with Worker(tmp_path / "slim", backend="cpu_reference", threads=1) as worker:
        worker.load()
        assert worker.perplexity(text, windows=2, length=16)["perplexity"] > 1


def test_a_workers_error_is_the_childs_error(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with Worker(folder, backend="cpu_reference") as worker, pytest.raises(EngineError, match=r"_proj.*192"):
        worker.load()
