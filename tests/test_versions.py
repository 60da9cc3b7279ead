"""Interface versions: 1.0 stays, older backends are accepted, and are not asked what they cannot know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from interface_surface import surface

import qhal
from qhal.requests import GemmRequest, GroupedRequest
from qhal.versions import mismatch, since

KEPT = json.loads((Path(__file__).parent / "interface_1_0.json").read_text())
NOW = surface()


@pytest.mark.parametrize("name", sorted(KEPT["QuantOps"]))
def test_members_of_the_first_interface_keep_their_signatures(name: str) -> None:
    assert NOW["QuantOps"].get(name) == KEPT["QuantOps"][name]


@pytest.mark.parametrize("name", sorted(KEPT["records"]))
def test_fields_of_the_first_interface_keep_names_and_defaults(name: str) -> None:
    now = NOW["records"].get(name, [])
    assert [f for f in now if f in KEPT["records"][name]] == KEPT["records"][name]
    added = [f for f in now if f not in KEPT["records"][name]]
    assert all(" = " in f for f in added), "what is added needs a default that means what was meant before"


def test_words_of_the_first_interface_stay() -> None:
    assert set(KEPT["qhal"]) <= set(NOW["qhal"])
    assert KEPT["classes"].items() <= NOW["classes"].items()


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        ((1, 0), (1, 0), True),
        ((1, 3), (1, 0), True),
        ((1, 3), (1, 4), False),
        ((2, 0), (1, 7), True),
        ((3, 0), (1, 7), False),
        ((1, 0), (0, 1), False),
        ((1, 2), (2, 0), False),
    ],
)
def test_this_and_the_previous_major_version_fit(ours: tuple[int, int], theirs: tuple[int, int], fits: bool) -> None:
    text = mismatch(ours, theirs)
    assert (text == "") == fits
    if not fits:
        assert f"{theirs[0]}.{theirs[1]}" in text and f"{ours[0]}.{ours[1]}" in text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Later(GemmRequest):
    """A request as a later interface might have it."""

    sparse: bool = dataclasses.field(default=False, metadata={"since": (1, 2)})


def later(**changes: object) -> Later:
    bf16 = qhal.Format("bf16")
    return Later(w=bf16, n=8, k=8, x=(bf16,), **changes)  # type: ignore[arg-type]


class Old(qhal.QuantOps):
    name, interface = "old", (1, 1)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def supports(self, request: qhal.Request) -> qhal.Support:
        return qhal.Support("full")


class New(Old):
    interface = (1, 2)


def test_a_request_needs_the_version_of_the_fields_it_uses() -> None:
    assert since(later()) == (1, 0)
    assert since(later(sparse=True)) == (1, 2)
    assert since(GroupedRequest(gemm=later(sparse=True), experts=2, groups="offsets")) == (1, 2)
    assert since(None) == (1, 0)


def test_an_old_backend_is_not_asked_about_fields_it_cannot_see() -> None:
    assert Old().supports(later())
    answer = Old().supports(later(sparse=True))
    assert answer.level == "not_implemented" and "1.2" in answer.reason and "1.1" in answer.reason
    assert New().supports(later(sparse=True))
    assert not Old().supports(GroupedRequest(gemm=later(sparse=True), experts=2, groups="offsets"))


def test_a_class_and_its_info_state_one_version() -> None:
    info = qhal.selection.BackendInfo(
        "old", (1, 0), 50, lambda: qhal.selection.Unavailable("", ""), lambda d: Old(), lambda a: Old()
    )
    with pytest.raises(qhal.InterfaceError, match=r"\(1, 0\) in its BackendInfo and \(1, 1\) in its class"):
        qhal.selection.load(info, qhal.selection.Device(0, "x"))


def test_a_class_without_a_version_is_refused() -> None:
    with pytest.raises(qhal.InterfaceError, match="interface: is missing"):

        class Silent(qhal.QuantOps):
            name = "silent"
