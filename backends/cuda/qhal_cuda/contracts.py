"""Do the optional libraries still have the functions that we call, as we call them? Read from their text; none is run.

    python -m qhal_cuda.contracts [FOLDER]

FOLDER holds the libraries as `pip install --no-deps --target FOLDER` leaves them; without it the installed ones are
read. Every call in this package to a function below is held against its definition: names, positions, what must be
given, and the defaults that we rely on. Exits with 1 if one does not fit, or if a library is not there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from qhal_cuda.libraries import LIBRARIES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contract:
    """Calls of one function of a library.

    file     where the library defines it, `target` its name there ("Class.method"; a class: its fields or __init__)
    ours     our file, `call` the name of the function in it
    relies   defaults that we count on, as text
    """

    file: str
    target: str
    ours: str
    call: str
    relies: dict[str, str] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """The module's name."""
        return self.file.partition("/")[0]


_WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
_PLAN = {"pos_encoding_mode": "'NONE'", "use_fp16_qk_reduction": "False", "custom_mask": "None"}
_RUN = {"lse_layout": "'NH'", "return_lse": "False", "q_scale": "None", "k_scale": "None", "v_scale": "None"}
_NONE = {"bias": "None", "input_scale": "None", "locks": "None", "tuning_config": "None", "hadamard_block_size": "None"}
_LAYER = {"num_experts": "0", "pad_shape_n": "0", "pad_shape_k": "0", "has_bias": "False", "is_fp_zero_point": "False"}
CONTRACTS = (
    Contract("flashinfer/prefill.py", _WRAPPER, "flashinfer.py", _WRAPPER, {"use_cuda_graph": "False"}),
    Contract("flashinfer/prefill.py", f"{_WRAPPER}.plan", "flashinfer.py", "_wrapper.plan", _PLAN),
    Contract("flashinfer/prefill.py", f"{_WRAPPER}.run", "flashinfer.py", "_wrapper.run", _RUN),
    Contract("humming/forward.py", "humming_forward", "humming/launch.py", "humming_forward", _NONE),
    Contract("humming/config/config.py", "LayerConfig", "humming/launch.py", "LayerConfig", _LAYER),
    Contract("humming/config/config.py", "ComputeConfig", "humming/launch.py", "dumps", {"use_f16_accum": "False"}),
)


@dataclass(frozen=True)
class Signature:
    """names: parameters in order; keyword: those that only a keyword reaches; default: text by name."""

    names: tuple[str, ...]
    keyword: frozenset[str]
    default: dict[str, str]
    more: bool = False


def broken(contract: Contract, root: Path) -> list[str]:
    """What does not fit; nothing: every call does."""
    file = root / contract.file
    if not file.is_file():
        return [f"{contract.file} is not there"]
    signature = read(file, contract.target)
    if signature is None:
        return [f"{contract.file} has no {contract.target}"]
    found = [
        f"{contract.target}: {name} is {signature.default.get(name, 'not there')} by default, we rely on {text}"
        for name, text in contract.relies.items()
        if signature.default.get(name) != text
    ]
    made = list(calls(HERE / contract.ours, contract.call))
    if not made:
        found.append(f"{contract.ours} has no call of {contract.call}")
    for line, count, names in made:
        at = f"{contract.ours}:{line}: {contract.target}"
        positional = [n for n in signature.names if n not in signature.keyword]
        if count > len(positional) and not signature.more:
            found.append(f"{at} takes {len(positional)} by position, we give {count}")
        found += [f"{at} has no {n}" for n in names if n not in signature.names and not signature.more]
        given = {*positional[:count], *names}
        found += [f"{at} needs {n}" for n in signature.names if n not in signature.default and n not in given]
    return found


def read(file: Path, target: str) -> Signature | None:
    """The last definition of that name: overloads stand before it. A class is its __init__, or a dataclass's fields."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    node: ast.stmt | None = None
    for name in target.split("."):
        named = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        if not named:
            return None
        node = named[-1]
        body = node.body
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not made:
            return _fields(node)
        node = made[-1]
    assert isinstance(node, ast.FunctionDef)
    return _parameters(node, method="." in target or bool(node.name == "__init__"))


def _parameters(node: ast.FunctionDef, *, method: bool) -> Signature:
    a = node.args
    ordered = [*a.posonlyargs, *a.args][1 if method else 0 :]
    default = {
        p.arg: ast.unparse(d)
        for p, d in zip(ordered[len(ordered) - len(a.defaults) :] if a.defaults else [], a.defaults, strict=True)
    }
    default |= {p.arg: ast.unparse(d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None}
    names = tuple(p.arg for p in (*ordered, *a.kwonlyargs))
    return Signature(names, frozenset(p.arg for p in a.kwonlyargs), default, a.kwarg is not None)


def _fields(node: ast.ClassDef) -> Signature:
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = [n for n in fields if "ClassVar" not in ast.unparse(n.annotation)]
    names = tuple(n.target.id for n in fields if isinstance(n.target, ast.Name))
    default = {
        n.target.id: ast.unparse(n.value) for n in fields if isinstance(n.target, ast.Name) and n.value is not None
    }
    return Signature(names, frozenset(names), default)


def calls(file: Path, name: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line, arguments by position, names) of every call whose function ends in `name`; `**d` is a dict of the file.

    A dict that is the only argument (`json.dumps`) counts as names.
    """
    tree = ast.parse(file.read_text())
    dicts = {
        ast.unparse(t): n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)
        for t in n.targets
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function != name and not function.endswith(f".{name}"):
            continue
        names = [k.arg for k in node.keywords if k.arg is not None]
        spread = [dicts[ast.unparse(k.value)] for k in node.keywords if k.arg is None]
        only = [n for n in node.args if isinstance(n, ast.Dict)]
        for d in (*spread, *only):
            names += [str(k.value) for k in d.keys if isinstance(k, ast.Constant)]
        yield node.lineno, len(node.args) - len(only), names


def main(folder: str | None = None) -> int:
    """Print every contract and how it stands."""
    state = 0
    for library in LIBRARIES:
        spec = None if folder else find_spec(library.name)
        root = Path(folder) if folder else Path(spec.origin).parents[1] if spec and spec.origin else None
        if root is None or not (root / library.name).is_dir():
            print(f"{library.package} {library.pinned}: not there; {library.install}")
            state = 1
            continue
        if not (root / f"{library.package.replace('-', '_')}-{library.pinned}.dist-info").is_dir():
            print(f"{library.package}: {root} holds another version than {library.pinned}; {library.install}")
            state = 1
        for contract in (c for c in CONTRACTS if c.library == library.name):
            wrong = broken(contract, root)
            print(f"{'BROKEN' if wrong else 'ok':7} {library.package} {library.pinned}: {contract.target}")
            for line in wrong:
                print(f"        {line}")
            state = 1 if wrong else state
    return state


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
