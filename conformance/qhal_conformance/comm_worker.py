"""One rank: `python -m qhal_conformance.comm_worker RANK WORLD STORE DEVICE`; messages and answers are lines of JSON.

What the backend prints goes to the error stream, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

import qhal
from qhal.errors import NoBackendError, UnsupportedError
from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.comm_check import on_rank
from qhal_conformance.problem import Fault, first_line

_TIMEOUT = timedelta(seconds=20)


def make(recipe: dict[str, Any], rank: int, device: str) -> QuantOps:
    """The backend by its name, on this rank's device, and what is wrapped around it."""
    ops = qhal.select(recipe["backend"] if device == "cpu" else f"{recipe['backend']}:{rank}")
    for path in recipe["wraps"]:
        module, _, name = path.partition(":")
        ops = getattr(import_module(module), name)(ops)
    return ops


def answer(message: dict[str, Any], state: dict[str, Any], rank: int, device: str) -> dict[str, Any]:
    """Make the backend, or run a case with it."""
    if "make" in message:
        try:
            state["ops"] = make(message["make"], rank, device)
        except (NoBackendError, ImportError, AttributeError) as missing:
            return {"missing": first_line(missing)}
        return {"made": True}
    case = Case(**_tuples(message["run"]))
    try:
        return on_rank(case, state["ops"], rank, state["groups"][case.size("w")])
    except Fault as fault:
        return {"fault": [fault.kind.value, fault.reason]}
    except UnsupportedError as refused:
        return {"unsupported": first_line(refused)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    shape = tuple((letter, size) for letter, size in fields["shape"])
    return {**fields, "shape": shape, "options": tuple(fields["options"])}


def main() -> None:
    """Join the group, then answer until the other end closes."""
    rank, world, store, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device == "cpu" else None,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=_TIMEOUT,
    )
    groups = {n: dist.new_group(list(range(n)), timeout=_TIMEOUT) for n in range(1, world + 1)}
    state: dict[str, Any] = {"groups": groups}

    def say(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    say({"ready": True})
    for line in sys.stdin:
        say(answer(json.loads(line), state, rank, device))
    os._exit(0)  # peers may be gone: no orderly shutdown


if __name__ == "__main__":
    main()
