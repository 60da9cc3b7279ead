"""Measures one checkpoint in transformers in a process of its own, so that its peak memory and load time are its own.

    with Worker(folder, backend="auto") as worker:      # backend=None: transformers alone, without qhal
        print(worker.load())
        print(worker.perplexity(text_file, skip=20000))
        print(worker.generate("Hello", tokens=48))

Two workers can live side by side; each runs only while it is asked, so alternating their calls compares them fairly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qhal.errors import QhalError
from qhal_engines import EngineError

Event = Callable[[dict[str, Any]], None]


class Worker:
    """A child process that holds one model. Calls return plain values; an error in the child is raised here as
    EngineError."""

    def __init__(
        self,
        folder: Path,
        *,
        backend: str | None,
        policy: str = "error",
        dtype: str = "auto",
        threads: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """`options` go to transformers' quantization config of the same class as the checkpoint's (backend=None
        only)."""
        settings = {"folder": str(folder), "backend": backend, "policy": policy, "dtype": dtype, "threads": threads}
        command = [sys.executable, "-m", "qhal_engines.measure", json.dumps({**settings, "options": options})]
        # Progress bars of the child go to the terminal through its stderr.
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def load(self) -> dict[str, float]:
        """What loading took, in seconds and bytes.

        load_s, first_forward_s (16 tokens); resident size before_bytes, load_peak_bytes, after_bytes,
        first_forward_peak_bytes; and what the loaded model keeps: model_bytes, largest_bytes (its largest module).
        """
        return dict(self._call("load"))

    def perplexity(
        self, text: Path, *, skip: int = 0, windows: int = 6, length: int = 512, on_event: Event | None = None
    ) -> dict[str, float]:
        """perplexity of the text (UTF-8) after its first `skip` characters, and tokens per second of the forward
        passes."""
        asked = {"text": str(text), "skip": skip, "windows": windows, "length": length}
        return dict(self._call("perplexity", on_event, **asked))

    def generate(
        self, prompt: str, *, tokens: int = 48, chat: bool = True, stop: bool = False, on_event: Event | None = None
    ) -> dict[str, Any]:
        """The fields of `generation.Generation`; events carry each new piece of text under "text"."""
        return dict(self._call("generate", on_event, prompt=prompt, tokens=tokens, chat=chat, stop=stop))

    def device(self) -> str:
        """Where the loaded model is: "cpu", or an accelerator's torch name."""
        return str(self._call("device"))

    def peak(self) -> int:
        """The largest resident size of the child so far, in bytes."""
        return int(self._call("peak"))

    def close(self) -> None:
        """Ends the child."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._child.kill()
        self.close()

    def _call(self, do: str, on_event: Event | None = None, **arguments: Any) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._child.stdin, flush=True)
        except BrokenPipeError as error:
            raise EngineError(f"the measuring process ended early (exit code {self._child.wait()})") from error
        for line in self._child.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise EngineError(answer["error"])
            if "result" in answer:
                return answer["result"]
            if on_event is not None:
                on_event(answer["event"])
        raise EngineError(f"the measuring process ended early (exit code {self._child.wait()}) while asked to {do}")


def peak_memory() -> int:
    """The largest resident size this process has had so far, in bytes; memory of accelerators is not in it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: the counter of getrusage would start at the size of the parent
        return _status_bytes(status, "VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """The resident size of this process now, in bytes (Linux; elsewhere the peak, which is never smaller)."""
    status = Path("/proc/self/status")
    return _status_bytes(status, "VmRSS") if status.exists() else peak_memory()


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def module_bytes(model: Any) -> list[int]:
    """Bytes that each module holds itself: parameters, buffers, prepared weights. A tied tensor counts once."""
    seen: set[int] = set()
    sizes = []
    for module in model.modules():
        size = int(getattr(module, "nbytes", 0))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                size += tensor.numel() * tensor.element_size()
        sizes.append(size)
    return sizes


class _Session:
    """The child's side: one model and the calls that `Worker` makes."""

    def __init__(self, settings: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
        self._settings, self._emit = settings, emit
        self._model: Any = None
        self._tokenizer: Any = None

    def load(self) -> dict[str, float]:
        import torch
        import transformers

        settings = self._settings
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        arguments: dict[str, Any] = {"dtype": settings["dtype"]}
        if settings["backend"] is not None:
            from qhal_engines import loading
            from qhal_engines.transformers import install

            install(settings["backend"], settings["policy"])
            arguments |= loading.arguments(settings["folder"])
        config = transformers.AutoConfig.from_pretrained(settings["folder"])
        if settings["backend"] is None and settings["options"]:
            method = config.quantization_config["quant_method"]
            named = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            arguments["quantization_config"] = named(**settings["options"])
        # Importing the model's code is not part of loading it.
        transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(settings["folder"])
        before, started = resident_memory(), time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings["folder"], **arguments).eval()
        loaded = time.perf_counter()
        peak, after = peak_memory(), resident_memory()
        sizes = module_bytes(self._model)
        with torch.inference_mode():
            self._model(torch.arange(16, device=self._model.device)[None])
        return {
            "load_s": loaded - started,
            "first_forward_s": time.perf_counter() - loaded,
            "before_bytes": before,
            "load_peak_bytes": peak,
            "after_bytes": after,
            "first_forward_peak_bytes": peak_memory(),
            "model_bytes": sum(sizes),
            "largest_bytes": max(sizes),
        }

    def perplexity(self, text: str, skip: int, windows: int, length: int) -> dict[str, float]:
        from qhal_engines.generation import perplexity

        words = Path(text).read_text(encoding="utf-8")[skip:]
        started = time.perf_counter()
        value = perplexity(
            self._model,
            self._tokenizer,
            words,
            windows,
            length,
            on_window=lambda done, so_far: self._emit({"window": done, "windows": windows, "perplexity": so_far}),
        )
        return {"perplexity": value, "tokens_per_s": windows * length / (time.perf_counter() - started)}

    def generate(self, prompt: str, tokens: int, chat: bool, stop: bool) -> dict[str, Any]:
        from dataclasses import asdict

        from qhal_engines.generation import chat_prompt, generate

        words = chat_prompt(self._tokenizer, prompt) if chat else prompt
        show = lambda piece: self._emit({"text": piece})  # noqa: E731
        made = generate(self._model, self._tokenizer, words, tokens, on_token=show, stop_at_end=stop)
        return asdict(made)

    def device(self) -> str:
        return str(self._model.device)

    def peak(self) -> int:
        return peak_memory()


def main(settings: dict[str, Any], commands: IO[str], answers: IO[str]) -> int:
    """Serves JSON commands, one a line, until `commands` ends."""

    def send(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=answers, flush=True)

    session = _Session(settings, lambda event: send("event", event))
    for line in commands:
        command = json.loads(line)
        try:
            send("result", getattr(session, command.pop("do"))(**command))
        except (QhalError, OSError, ValueError) as error:
            send("error", str(error))
            return 1
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description="serves one Worker; not meant to be called by hand")
    _parser.add_argument("settings", type=json.loads)
    _arguments = _parser.parse_args()
    # Whatever a library prints must not mix with the answers.
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(main(_arguments.settings, sys.stdin, _answers))
