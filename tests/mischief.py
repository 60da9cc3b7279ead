"""A package of backends that do everything a backend must not, and its fixture: what goes wrong is read from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BACKENDS = '''
"""One backend whose mischief is read from a file before each gemm; others that cannot be loaded."""
import contextlib, ctypes, os, pathlib, random, signal, sys, time
import numpy, torch, qhal
from qhal.selection import Available, BackendInfo, Device
from qhal_conformance.wrapping import Wrapped

WORD = pathlib.Path(__file__).with_name("mischief.txt")

KEPT = []
def inference(): KEPT.append(torch.inference_mode()); KEPT[-1].__enter__()
def raises(): raise ValueError("no such kernel\\nand a second line")
def interrupt(): raise KeyboardInterrupt
def prints():
    print("hello from the kernel"); print("\\x1b[2Jloud", file=sys.stderr)
    os.write(1, bytes(range(128, 256)) + b"\\n"); ctypes.CDLL(None).puts(b"from C")
def floods():
    while True: os.write(1, b"x" * 65536 + b"\\n")
def closes():
    sys.stdout.close()
    with contextlib.suppress(OSError): os.close(1)
def forks():
    if os.fork() == 0: WORD.with_name("forked.txt").write_text(str(os.getpid()))
def pipes(): os.closerange(3, 64)

MISCHIEF = {
    "raises": raises, "interrupt": interrupt, "prints": prints, "closes": closes, "forks": forks, "pipes": pipes,
    "exit": lambda: sys.exit(3), "os-exit": lambda: os._exit(7), "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(600),
    "floods": floods, "inference": inference,
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "grad": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "seed": lambda: torch.manual_seed(1), "numpy": lambda: numpy.random.seed(1), "random": lambda: random.seed(1),
    "subnormals": lambda: torch.set_flush_denormal(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
}

class Bad(Wrapped):
    name = "bad"
    def gemm(self, x, w, *, input=0, out=None):
        word = WORD.read_text()
        y = self._inner.gemm(x, w, input=input, out=out)
        if word in MISCHIEF: MISCHIEF[word]()
        return {"none": None, "list": [1.0], "array": y.float().numpy()}.get(word, y)
    def supports(self, request):
        word = WORD.read_text()
        if word == "supports-raises": raise RuntimeError("never asked")
        if word == "supports-exits": raise SystemExit(2)
        if word == "supports-hangs": time.sleep(600)
        return {"supports-none": None, "supports-yes": True}.get(word, self._inner.supports(request))
    def prepare(self, w, request, *, inputs=(), operand=None, bias=None, into=None):
        made = self._inner.prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        return None if WORD.read_text() == "prepare-none" else made
    def restore(self, thing):
        return None if WORD.read_text() == "restore-none" else self._inner.restore(thing)
    @property
    def device(self):
        if WORD.read_text() == "device-raises": raise OSError("device lost")
        return self._inner.device

def _info(name, load):
    devices = Available((Device(0, "test"),))
    return BackendInfo(name, qhal.INTERFACE_VERSION, 500, lambda: devices, load, load)

def bad(): return _info("bad", lambda device: Bad(qhal.select("cpu_reference")))
def load_crash(): return _info("load_crash", lambda device: ctypes.string_at(0))
def load_exit(): return _info("load_exit", lambda device: sys.exit("needs a licence"))
def load_hang(): return _info("load_hang", lambda device: time.sleep(600))
def twice(): return _info("twice", lambda device: Bad(qhal.select("cpu_reference")))
'''
NAMES = ("bad", "load_crash", "load_exit", "load_hang", "twice")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The backends, registered like any vendor's package, and a second package that registers one of them again."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bad_backends.py").write_text(BACKENDS)
    (folder / "mischief.txt").write_text("")
    for package, names in (("bad-backends", NAMES), ("copied-backends", ("twice",))):
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "".join(f"{name} = bad_backends:{name}\n" for name in names)
        (info / "entry_points.txt").write_text(f"[qhal.backends]\n{points}")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
