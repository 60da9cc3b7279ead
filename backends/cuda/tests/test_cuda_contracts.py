"""Contracts are read from text: what fits, what does not, and what the text of a library looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from qhal_cuda import contracts
from qhal_cuda.contracts import CONTRACTS, Contract, broken, calls, main, read
from qhal_cuda.libraries import LIBRARIES, missing

PREFILL = """
class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"): ...
    @overload
    def plan(self): ...
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, custom_mask=None, causal=False, pos_encoding_mode="NONE",
             use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type="float16",
             kv_data_type=None, o_data_type=None, seq_lens=None): ...
    def run(self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
            return_lse=False, lse_base="log2", lse_layout="NH"): ...
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "prefill.py").write_text(PREFILL)
    return tmp_path


def flash() -> list[Contract]:
    return [c for c in CONTRACTS if c.library == "flashinfer"]


def test_calls_that_fit_are_found_and_fit(library: Path) -> None:
    for contract in flash():
        assert list(calls(contracts.HERE / contract.ours, contract.call))
        assert broken(contract, library) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seq_lens=None", "seqlens=None", "plan has no seq_lens"),
        ("page_size, custom", "page_size, mode, custom", "plan needs mode"),
        ('lse_layout="NH"', 'lse_layout="HN"', "lse_layout is 'HN' by default, we rely on 'NH'"),
        ("def run(", "def go(", "has no BatchPrefillWithPagedKVCacheWrapper.run"),
        ("head_dim_qk, page_size, custom_mask=None", "custom_mask=None, head_dim_qk=1, page_size=1", ""),
        ("kv_layout=", "*, kv_layout=", "takes 1 by position, we give 2"),
    ],
)
def test_a_library_that_changed_is_said(library: Path, old: str, new: str, said: str) -> None:
    file = library / "flashinfer" / "prefill.py"
    assert old in PREFILL
    file.write_text(PREFILL.replace(old, new))
    found = [line for contract in flash() for line in broken(contract, library)]
    assert any(said in line for line in found) if said else not found


def test_fields_of_a_dataclass_are_its_parameters(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("class C:\n    n: ClassVar[int] = 1\n    a: int\n    b: bool = False\n")
    found = read(tmp_path / "x.py", "C")
    assert found is not None and found.names == ("a", "b") and found.default == {"b": "False"}
    assert read(tmp_path / "x.py", "D") is None


def test_a_library_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert all(f"{x.package} {x.pinned}: not there; {x.install}" in shown for x in LIBRARIES)


@pytest.mark.skipif(any(missing(x) for x in LIBRARIES), reason="the pinned libraries are not installed here")
def test_the_pinned_libraries_fit() -> None:
    assert main() == 0
