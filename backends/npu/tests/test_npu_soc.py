"""Which generation a device is."""

from __future__ import annotations

import pytest

import qhal
from qhal_npu import backend
from qhal_npu.soc import EXAMPLES, GENERATIONS, generation


def test_every_generation_has_a_name_and_archs_say_so() -> None:
    assert set(EXAMPLES) == set(GENERATIONS) == set(backend().archs)
    assert all(generation(name) == found for found, name in EXAMPLES.items())


@pytest.mark.parametrize(
    ("number", "found"), [(220, "A2"), (225, "A2"), (250, "A3"), (256, "A3"), (260, "A5"), (200, "310P")]
)
def test_numbers_are_ranges_and_win_over_names(number: int, found: str) -> None:
    assert generation("a name of tomorrow", number) == found


def test_a_310b_is_no_310p() -> None:
    with pytest.raises(qhal.BackendError, match=r"Ascend310B1 \(SoC 240\): this backend knows A2"):
        generation("Ascend310B1", 240)


def test_an_unknown_generation_is_refused_offline() -> None:
    with pytest.raises(qhal.UnsupportedError, match="none of A2, A3"):
        backend().offline("A4")
