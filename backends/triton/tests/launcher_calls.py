"""Run by `test_triton_launching.py` without the interpreter: launches for a chip that is not here, told."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhal_triton.absent import Absent, Launch, absent
from qhal_triton.compile import target_of
from qhal_triton.launching import MOST, Launcher


@triton.jit
def scaled(x, y, bias, n, factor, stride, B: tl.constexpr):
    """Every kind of argument."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + at * stride, mask=at < n, other=0).to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + at, mask=at < n, other=0)
    tl.store(y + at, value, mask=at < n)


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        memo[id(self)] = made = self.clone()
        return made  # type: ignore[return-value]


class Counted(Launcher):
    """Counts what goes Triton's own way."""

    ordinaries = 0

    def ordinary(self, grid: Any, tensors: Any, numbers: Any) -> Any:
        Counted.ordinaries += 1
        return super().ordinary(grid, tensors, numbers)


MEMORY = {kind: torch.zeros(4096, dtype=kind).as_subclass(OnGpu) for kind in (torch.float32, torch.bfloat16)}
BIAS = torch.zeros(4096).as_subclass(OnGpu)


def launcher(bias: Tensor | None = BIAS) -> Counted:
    return Counted(scaled, ("x", "y"), ("n", "factor", "stride"), {"bias": bias, "B": 16}, num_warps=1)


def told(made: Launch) -> tuple[Any, ...]:
    """What a launch started, and with what; tensors by their addresses."""
    values = tuple(v.data_ptr() if isinstance(v, Tensor) else v for v in made.arguments)
    return made.source, made.grid, made.binary, values


def different(driver: Absent) -> list[str]:
    """Calls whose second launch is not that of Triton, or was not made directly."""
    start, found = launcher(), []
    kinds = itertools.product(MEMORY.values(), (0, 1, 8), (1, 2, 16, 48, 1 << 32), (1.0, 0.5), (1, 3, 16))
    for x, first, n, factor, stride in kinds:
        tensors, numbers = (x[first:], MEMORY[torch.float32]), (n, factor, stride)
        for _ in range(2):
            start((4, 1, 1), tensors, numbers)
        before = Counted.ordinaries
        start((4, 1, 1), tensors, numbers)
        direct = told(driver.launches[-1])
        start.ordinary((4, 1, 1), tensors, numbers)
        if Counted.ordinaries != before + 1 or direct != told(driver.launches[-1]):
            found.append(f"{x.dtype} from {first} {numbers}")
    return found


def noticed(driver: Absent) -> dict[str, bool]:
    """Which changes send a launch the ordinary way, or to another binary."""
    start, (x, y) = launcher(), MEMORY.values()
    same: tuple[Any, ...] = (4, 1, 1), (x, x), (64, 0.5, 1)

    def ordinary(*call: Any) -> bool:
        before = Counted.ordinaries
        start(*(call or same))
        return Counted.ordinaries > before

    def hooked(chain: Any) -> bool:
        seen: list[object] = []
        hook = lambda *_: seen.append(1)  # noqa: E731
        chain.add(hook)
        went = ordinary()
        chain.remove(hook)
        return went and not ordinary()

    found = {"first": ordinary(), "again": not ordinary()}
    found["processor"] = ordinary((4, 1, 1), (torch.zeros(64), x), (64, 0.5, 1))
    found["type"] = ordinary((4, 1, 1), (y, x), (64, 0.5, 1))
    found["alignment"] = ordinary((4, 1, 1), (x[1:], x), (64, 0.5, 1))
    found["number"] = ordinary((4, 1, 1), (x, x), (65, 0.5, 1))
    found["grid"] = not ordinary((5, 1, 1), (x, x), (64, 0.5, 1)) and driver.launches[-1].grid == (5, 1, 1)
    found["entered"] = hooked(triton.knobs.runtime.launch_enter_hook)
    found["left"] = hooked(triton.knobs.runtime.launch_exit_hook)
    scaled.pre_run_hooks.append(lambda *_, **__: None)
    found["before"] = ordinary()
    scaled.pre_run_hooks.clear()
    here = driver.get_current_device
    driver.get_current_device = lambda: "another"  # type: ignore[method-assign]
    found["device"] = ordinary() and not ordinary()
    driver.get_current_device = here  # type: ignore[method-assign]
    for n in range(100, 101 + MOST):
        ordinary((4, 1, 1), (x, x), (n, 0.5, 1))
    found["bounded"] = len(start._found) <= MOST
    return found


def copied(driver: Absent) -> bool:
    """Whether a copy launches with the copy of what is fixed."""
    x, held = MEMORY[torch.float32], {"start": launcher(BIAS), "bias": BIAS}
    for _ in range(2):
        held["start"]((4, 1, 1), (x, x), (64, 0.5, 1))  # type: ignore[operator]
    twin = copy.deepcopy(held)
    for _ in range(2):
        twin["start"]((4, 1, 1), (x, x), (64, 0.5, 1))  # type: ignore[operator]
    first, second = (told(driver.launches[i])[3][2] for i in (-3, -1))
    return first == BIAS.data_ptr() and second == twin["bias"].data_ptr() != first  # type: ignore[union-attr]


def main(arch: str, cache: Path) -> None:
    with absent(target_of(arch), cache) as driver:
        told_all = {"different": different(driver), "noticed": noticed(driver), "copied": copied(driver)}
    print(json.dumps(told_all))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
