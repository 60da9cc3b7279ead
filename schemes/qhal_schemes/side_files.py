"""Side files that tools pickle beside a checkpoint: only tensors in dictionaries are accepted, and no code is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal_schemes.source import TensorIndex, inside
from qhal_schemes.strict_json import is_file


def load_pickle(folder: Path, name: str) -> Mapping[object, object]:
    """The dictionary in a file of torch.save, read with weights_only. CheckpointError, naming it, for any other."""
    path = inside(folder, name)
    if not is_file(path):
        raise CheckpointError(f"{path}: is {'no regular file' if path.exists() else 'missing'}")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
            IndexError, zipfile.BadZipFile, NotImplementedError, OverflowError, MemoryError) as bad:  # fmt: skip
        reason = str(bad).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path}: expected tensors in a dictionary, saved by torch.save; anything else in it, code above all, is "
            f"not loaded ({type(bad).__name__}: {reason})"
        ) from None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(value).__name__}")
    return value


def without(index: TensorIndex, name: str) -> TensorIndex:
    """The index, with a side file that a scheme reads taken from those that nothing reads."""
    return replace(index, unread=tuple(file for file in index.unread if file != name))


def matrix(path: Path, name: str, value: object, shape: tuple[int | None, ...]) -> Tensor:
    """A finite float tensor of this shape (None: any size) out of such a file; CheckpointError for anything else."""
    wanted = f"a float tensor [{', '.join('*' if n is None else str(n) for n in shape)}]"
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: {name}: expected {wanted}, found {type(value).__name__}")
    fits = value.dim() == len(shape) and all(n in (None, have) for n, have in zip(shape, value.shape, strict=True))
    if not fits or not value.is_floating_point() or value.layout != torch.strided:
        raise CheckpointError(f"{path}: {name}: expected {wanted}, found {value.dtype} {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{path}: {name}: expected finite values, found NaN or Inf")
    return value.detach()


def check_inverse(path: Path, name: str, m: Tensor, inverse: Tensor) -> None:
    """m @ inverse must be the identity: |error| <= n * eps * cond(m), what rounding to the dtype of `m` can do.

    CheckpointError also for a singular matrix (cond * eps >= 1).
    """
    eps = torch.finfo(m.dtype).eps
    condition = float(torch.linalg.cond(m.double()))
    if not condition * eps < 1:
        raise CheckpointError(f"{path}: {name}: expected a matrix that can be inverted, condition is {condition:.3g}")
    _check_identity(path, f"{name} times its inverse", m, inverse, m.shape[0] * eps * condition)


def check_orthogonal(path: Path, name: str, m: Tensor) -> None:
    """m @ m^T must be the identity: |error| <= n * eps, what rounding to the dtype of `m` can do."""
    _check_identity(path, f"{name} times its transpose", m, m.t(), m.shape[0] * torch.finfo(m.dtype).eps)


def _check_identity(path: Path, what: str, m: Tensor, other: Tensor, bound: float) -> None:
    error = float((m.double() @ other.double() - torch.eye(m.shape[0], dtype=torch.float64)).abs().max())
    if not error <= bound:
        raise CheckpointError(f"{path}: {what}: expected the identity to {bound:.3g}, found an error of {error:.3g}")
