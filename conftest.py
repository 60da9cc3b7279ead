"""Triton's kernels run in its interpreter where no GPU is: decided when a kernel is defined, so before imports."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
