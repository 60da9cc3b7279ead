"""Ways to spoil one tensor of a module that is about to be written: tensors by the last part of their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]


def cut(leaf: str, axis: int) -> Change:
    """One shorter along an axis."""

    def change(t: Tensors) -> None:
        t[leaf] = t[leaf].narrow(axis, 0, t[leaf].shape[axis] - 1).contiguous()

    return change


def put(leaf: str, value: Tensor) -> Change:
    """Another tensor in its place."""
    return lambda t: t.update({leaf: value})


def last(leaf: str, value: float) -> Change:
    """Another last number."""

    def change(t: Tensors) -> None:
        t[leaf] = t[leaf].clone()
        t[leaf].view(-1)[-1] = value

    return change


def drop(leaf: str) -> Change:
    """Missing."""

    def change(t: Tensors) -> None:
        del t[leaf]

    return change
