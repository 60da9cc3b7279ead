"""Choosing a backend: every candidate is explained, nothing is swallowed, the environment is obeyed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qhal
from qhal import selection
from qhal.selection import Available, BackendInfo, Broken, Device, Unavailable


class Chip(qhal.QuantOps):
    name, interface = "chip", (1, 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def supports(self, request: qhal.Request) -> qhal.Support:
        return qhal.Support("unsupported", "a test chip")

    def gemm(self, x, w, *, input=0, out=None):  # type: ignore[no-untyped-def]
        return x

    def quantize(self, x, to, *, for_=None, out=None):  # type: ignore[no-untyped-def]
        return qhal.QTensor(qhal.Format.parse("fp32"), x)


def _info(name: str, order: int, probe: Callable[[], Available | Unavailable], version: tuple[int, int] = (1, 0)):  # type: ignore[no-untyped-def]
    return BackendInfo(name, version, order, probe, lambda device: Chip(), lambda arch: Chip())


def _usable() -> Available:
    return Available((Device(0, "a0"), Device(1, "a1")))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, BackendInfo | Broken]:
    found: dict[str, BackendInfo | Broken] = {}
    monkeypatch.setattr(selection, "backends", lambda: dict(sorted(found.items(), key=lambda kv: _order(kv[1]))))
    monkeypatch.delenv("QHAL_BACKEND", raising=False)
    return found


def _order(info: BackendInfo | Broken) -> int:
    return info.order if isinstance(info, BackendInfo) else 10_000


def test_auto_prefers_an_accelerator_over_the_reference(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["cpu_reference"] = _info("cpu_reference", 0, _usable)
    installed["chip"] = _info("chip", 50, _usable)
    assert qhal.select("auto").name == "chip"


def test_auto_takes_the_reference_with_a_word(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["cpu_reference"] = _info("cpu_reference", 1000, _usable)
    installed["chip"] = _info("chip", 50, lambda: Unavailable("no chip", "plug one in"))
    with pytest.warns(UserWarning, match="no accelerator"):
        qhal.select("auto")


def test_auto_passes_over_a_backend_that_executes_nothing_and_says_so(
    installed: dict[str, BackendInfo | Broken],
) -> None:
    class Shell(Chip):
        gemm = qhal.QuantOps.gemm

    installed["cpu_reference"] = _info("cpu_reference", 1000, _usable)
    installed["shell"] = BackendInfo("shell", (1, 0), 50, _usable, lambda device: Shell(), lambda arch: Shell())
    with pytest.warns(UserWarning, match="shell finds a0, but this version executes none"):
        assert type(qhal.select("auto")) is Chip
    assert type(qhal.select("shell")) is Shell


def test_nothing_usable_lists_every_candidate(installed: dict[str, BackendInfo | Broken]) -> None:
    def broken() -> Available:
        raise RuntimeError("driver mismatch")

    installed["chip"] = _info("chip", 50, lambda: Unavailable("no chip", "plug one in"))
    installed["odd"] = _info("odd", 60, broken)
    installed["torn"] = Broken("torn", "its module is missing", "reinstall torn")
    with pytest.raises(qhal.NoBackendError) as error:
        qhal.select("auto")
    for text in ("no chip", "plug one in", "driver mismatch", "its module is missing", "reinstall torn"):
        assert text in str(error.value)


def test_the_environment_overrides_auto_only(
    installed: dict[str, BackendInfo | Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["chip"] = _info("chip", 50, _usable)
    installed["other"] = _info("other", 60, lambda: Unavailable("not here", "buy one"))
    monkeypatch.setenv("QHAL_BACKEND", "other")
    with pytest.raises(qhal.NoBackendError, match=r"from QHAL_BACKEND.*not here"):
        qhal.select("auto")
    assert qhal.select("chip").name == "chip"


def test_a_device_index_must_exist(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["chip"] = _info("chip", 50, _usable)
    assert qhal.select("chip:1").name == "chip"
    with pytest.raises(qhal.NoBackendError, match="chip:0, chip:1"):
        qhal.select("chip:7")


def test_another_interface_version_is_named_with_both_numbers(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["chip"] = _info("chip", 50, _usable, (0, 9))
    with pytest.raises(qhal.InterfaceError, match=r"interface 0\.9.*qhal 1\.0"):
        qhal.select("chip")
    assert isinstance(selection.probe(installed["chip"]), Unavailable)


def test_required_operations(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["chip"] = _info("chip", 50, _usable)
    assert qhal.select("chip", require=["quantize"]).name == "chip"
    with pytest.raises(qhal.NoBackendError, match="attention"):
        qhal.select("chip", require=["quantize", "attention"])


def test_an_emulator_is_taken_by_name_only(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["cpu_reference"] = _info("cpu_reference", 1000, _usable)
    installed["chip"] = _info("chip", 50, lambda: Available((Device(0, "a0", evidence="L2"),)))
    with pytest.warns(UserWarning, match="chip is emulated here, which only its name selects, so cpu_reference runs"):
        qhal.select("auto")
    assert qhal.select("chip").name == "chip"


def test_the_offline_form_needs_no_device(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["chip"] = _info("chip", 50, lambda: Unavailable("no chip", "plug one in"))
    assert qhal.select("chip", arch="a7").name == "chip"


def test_installed_backends_answer_offline_and_explain_themselves() -> None:
    found = qhal.backends()
    assert {"cpu_reference", "cuda", "rocm", "npu"} <= set(found)
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=64, k=128, x=(qhal.Format.parse("bf16"),))
    for name, arch in (("cuda", "sm_90"), ("rocm", "gfx942"), ("npu", "A2"), ("cpu_reference", "cpu")):
        support = qhal.select(name, arch=arch).supports(request)
        assert support.level in ("full", "conditional", "not_implemented")
        assert support.executes or support.reason


def test_a_broken_entry_point_is_listed_not_swallowed(tmp_path: Path) -> None:
    meta = tmp_path / "torn-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[qhal.backends]\ntorn = torn_module:backend\n")
    script = f"import sys; sys.path.append({str(tmp_path)!r})\nimport qhal\nprint(qhal.backends()['torn'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "ModuleNotFoundError" in done.stdout
    assert "uninstall torn" in done.stdout


def test_the_unrelated_distribution_is_detected(tmp_path: Path) -> None:
    meta = tmp_path / "qhal-0.3.2.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: qhal\nVersion: 0.3.2\n")
    script = f"import sys; sys.path.append({str(tmp_path)!r})\nimport qhal"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip uninstall -y qhal" in done.stderr


def test_the_command_line_detects_a_package_that_shadows_ours(tmp_path: Path) -> None:
    (tmp_path / "qhal").mkdir()
    (tmp_path / "qhal" / "__init__.py").write_text("class Circuit: ...\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom qhal_cli.entry import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "qhal-core" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spec", ["auto:7", "cpu_reference:", "cpu_reference:²", "cpu_reference:-1", None, 3])
def test_unreadable_specs_are_one_error(spec: object) -> None:
    with pytest.raises(qhal.NoBackendError):
        qhal.select(spec)  # type: ignore[arg-type]


def test_a_near_name_is_offered_and_blanks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(qhal.NoBackendError, match="did you mean cuda"):
        qhal.select("CUDA")
    monkeypatch.setenv("QHAL_BACKEND", "  cpu_reference ")
    assert qhal.select().name == "cpu_reference"
    for empty in ("", "auto"):
        monkeypatch.setenv("QHAL_BACKEND", empty)
        with pytest.warns(UserWarning, match="so cpu_reference runs"):
            qhal.select()


def test_an_architecture_is_never_ignored() -> None:
    with pytest.raises(qhal.NoBackendError, match="needs a backend's name"):
        qhal.select("auto", arch="sm_90")
    with pytest.raises(qhal.NoBackendError, match="it knows sm_80"):
        qhal.select("cuda", arch="banana")
    with pytest.raises(qhal.NoBackendError, match="has no meaning with arch"):
        qhal.select("cuda:1", arch="sm_90")


def test_a_backend_that_fails_to_load_is_one_error_and_auto_goes_on(
    installed: dict[str, BackendInfo | Broken],
) -> None:
    def fails(device: object) -> qhal.QuantOps:
        raise RuntimeError("no such symbol")

    installed["torn"] = BackendInfo("torn", (1, 0), 5, _usable, fails, fails)
    installed["chip"] = _info("chip", 50, _usable)
    with pytest.raises(qhal.BackendError, match="no such symbol"):
        qhal.select("torn")
    with pytest.raises(qhal.BackendError, match="no such symbol"):
        qhal.select("torn", arch="a0")
    assert qhal.select("auto").name == "chip"


@pytest.mark.parametrize("answer", [Available(()), None, "yes"])
def test_a_probe_that_answers_nonsense_is_unusable(installed: dict[str, BackendInfo | Broken], answer: object) -> None:
    installed["odd"] = _info("odd", 50, lambda: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(qhal.NoBackendError, match="its probe answered"):
        qhal.select("odd")


def test_requirements_are_names_of_the_interface(installed: dict[str, BackendInfo | Broken]) -> None:
    installed["chip"] = _info("chip", 50, _usable)
    with pytest.raises(qhal.NoBackendError, match="give a collection"):
        qhal.select("chip", require="gemm")
    with pytest.raises(qhal.NoBackendError, match="did you mean 'attention'"):
        qhal.select("chip", require=["atention"])
    assert qhal.select("chip", require=["linear", "experts", "synchronize", "gemm"]).name == "chip"


def test_auto_looks_further_for_what_is_required(installed: dict[str, BackendInfo | Broken]) -> None:
    class Attends(Chip):
        name = "attends"

        def attention(self, q, cache, batch, *, sinks=None, out=None, lse=None):  # type: ignore[no-untyped-def]
            return q

    installed["chip"] = _info("chip", 50, _usable)
    installed["attends"] = BackendInfo("attends", (1, 0), 60, _usable, lambda d: Attends(), lambda a: Attends())
    assert qhal.select("auto", require=["attention"]).name == "attends"
    with pytest.raises(qhal.NoBackendError, match="lacks hadamard"):
        qhal.select("auto", require=["hadamard"])
