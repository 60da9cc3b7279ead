"""Products of 16-bit floats by torch: rounded once, and its switches left as they were."""

from __future__ import annotations

import pytest
import torch

from qhal_triton import wide

SWITCHES, NAME = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"


@pytest.mark.parametrize("given", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("fails", [False, True])
def test_no_part_of_a_sum_is_rounded_and_the_switch_goes_back(
    given: tuple[bool, bool], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(getattr(SWITCHES, NAME))
        if fails:
            raise RuntimeError("no such product")
        return a @ b

    before = getattr(SWITCHES, NAME), getattr(SWITCHES, f"{NAME}_split_k")
    monkeypatch.setattr(torch, "mm", mm)
    try:
        setattr(SWITCHES, NAME, given)
        if fails:
            with pytest.raises(RuntimeError, match="no such product"):
                wide._rounded_last(torch.ones(2, 3), torch.ones(3, 2))
        else:
            assert torch.equal(wide._rounded_last(torch.ones(2, 3), torch.ones(3, 2)), torch.full((2, 2), 3.0))
        assert seen == [False]
        assert (getattr(SWITCHES, NAME), getattr(SWITCHES, f"{NAME}_split_k")) == given
    finally:
        setattr(SWITCHES, NAME, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_rounded_once_after_the_bias(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=chance).bfloat16() for size in ((5, 64), (64, 7)))
    bias = torch.randn(7, generator=chance)
    sums = a.float() @ b.float()
    assert torch.equal(wide.float_product(a, b, dtype), sums.to(dtype))
    assert torch.equal(wide.float_product(a, b, dtype, bias), (sums + bias).to(dtype))
