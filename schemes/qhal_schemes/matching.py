"""Matching: which modules a configuration means by a name, a pattern or a class, and never by a mere substring.

Rules of compressed-tensors (utils/match.py): `re:` patterns are anchored at the start of the full name; anything else
is the exact name of a module or the name of its class. A fused name (`qkv_proj`) stands for its parts and vice versa.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from qhal.errors import CheckpointError
from qhal_schemes.base import CheckpointWarning

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""Fused modules of engines and models, and the projections they join, in order."""

_WARNINGS = 20  # entries that match nothing and are named one by one: looking for near names takes a while
_ALIAS = {part: fused for fused, parts in FUSED.items() for part in parts}
_GLOB = frozenset("*?[")
LINEAR, EMBEDDING = "Linear", "Embedding"
_LINEAR_CLASSES = frozenset({LINEAR, "LinearBase", "torch.nn.Linear", "torch.nn.modules.linear.Linear"})
_EMBEDDINGS = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def module_class(name: str) -> str:
    """The class of a module with a 2-D weight, by its name: a file does not store classes."""
    leaf = name.rpartition(".")[2]
    return EMBEDDING if "embed" in leaf or leaf in _EMBEDDINGS else LINEAR


def is_router(name: str) -> bool:
    """Whether a module picks experts; several models do this with a class of their own, not with a Linear."""
    return name.rpartition(".")[2] in _ROUTERS


def fused_parts(name: str) -> tuple[str, ...]:
    """The full names of the projections that a fused name stands for; () if it is none."""
    head, dot, leaf = name.rpartition(".")
    return tuple(f"{head}{dot}{part}" for part in FUSED.get(leaf, ()))


_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def compile_pattern(text: str) -> re.Pattern[str]:
    """A regular expression of a configuration; re.error also for one whose search could take exponential time.

    That takes a repeated group with a repetition or a choice inside, `(a+)+` or `(a|ab)*`; no list of modules needs it.
    """
    plain = _ATOM.sub("x", text)  # escapes and sets are single characters
    opened: list[bool] = []  # for every open group: has it a repetition or a choice inside?
    for at, character in enumerate(plain):
        if character == "(":
            opened.append(False)
        elif character == ")" and opened:
            inner = opened.pop()
            if inner and _REPEAT.match(plain, at + 1):
                raise re.error(f"a group that repeats what repeats or chooses, up to character {at + 1}")
            if inner and opened:
                opened[-1] = True
        elif opened and (character == "|" or _REPEAT.match(plain, at)):
            opened[-1] = True
    return re.compile(text)


def _means(pattern: re.Pattern[str], fused: str) -> bool:
    """Whether a pattern names a fused module: `.*v_proj$` matches `qkv_proj`, but names one of its parts."""
    return pattern.match(fused) is not None and not any(pattern.match(part) for part in fused_parts(fused))


class Patterns:
    """A list of names and `re:` patterns of a configuration; remembers which of them matched something."""

    def __init__(self, what: str, patterns: Sequence[str]) -> None:
        self.what = what
        self.patterns = tuple(patterns)
        self.used: set[str] = set()
        self._exact = {p for p in self.patterns if not p.startswith("re:")}
        self._regex: list[tuple[str, re.Pattern[str]]] = []
        for p in self.patterns:
            if p.startswith("re:"):
                try:
                    self._regex.append((p, compile_pattern(p[3:])))
                except (re.error, RecursionError, OverflowError) as bad:
                    raise CheckpointError(f"{what}: {p!r} is no regular expression: {bad}") from None

    def find(self, name: str, kind: str = LINEAR) -> str | None:
        """The pattern that matches a module (exact name, then regex, then class), or None."""
        found = self._find_name(name)
        if found is None:
            parts = fused_parts(name)
            hits = [self._find_name(part) for part in parts]
            if any(hits) and not all(hits):
                names = ", ".join(p for p, hit in zip(parts, hits, strict=True) if hit is None)
                raise CheckpointError(f"{self.what}: {name} is fused, but {names} is not matched like its other parts")
            found = hits[0] if hits else None
        if found is None:
            classes = _LINEAR_CLASSES if kind == LINEAR else {kind}
            found = next((p for p in self.patterns if p in classes), None)
        if found is not None:
            self.used.add(found)
        return found

    def _find_name(self, name: str) -> str | None:
        head, dot, leaf = name.rpartition(".")
        alias = f"{head}{dot}{_ALIAS[leaf]}" if leaf in _ALIAS else name
        for candidate in (name, alias):
            if candidate in self._exact:
                return candidate
        return next((p for p, r in self._regex if r.match(name) or (alias != name and _means(r, alias))), None)

    def unused(self) -> tuple[str, ...]:
        """The patterns that matched nothing so far."""
        return tuple(p for p in self.patterns if p not in self.used)

    def _names(self, pattern: str, name: str) -> bool:
        """Whether this one pattern is the name."""
        return pattern == name

    def partial(self, module: str) -> str:
        """Text with the entries that are a mere part of a module's name, "" if there are none."""
        parts = [repr(p) for p in self.patterns if p != module and p.removeprefix("re:") in module]
        return f"; {', '.join(parts)} of {self.what} is only a part of its name" if parts else ""

    def warn_unused(self, modules: Collection[str], also: Iterable[str] = ()) -> None:
        """One CheckpointWarning for every pattern that matches no module, with the names it may have meant.

        also  modules that a pattern may name although nothing asked about them: embeddings, norms
        """
        self.used.update(p for p in self.unused() if any(self._names(p, name) for name in also))
        unused = self.unused()
        for i, pattern in enumerate(unused[: _WARNINGS + 1]):
            rest = f"; and {len(unused) - _WARNINGS} more" if i == _WARNINGS else near_text(pattern, modules)
            warnings.warn(
                f"{self.what}: {pattern[:200]!r} matches no module{rest}",
                CheckpointWarning,
                stacklevel=3,
            )


class PathPatterns(Patterns):
    """Names that match a run of whole components of a module's path: `gate` is `mlp.gate`, never `mlp.gate_proj`."""

    def _find_name(self, name: str) -> str | None:
        path = f".{name}."
        return next((p for p in self.patterns if f".{p}." in path), None)


class GlobPatterns(Patterns):
    """Names and shell patterns (`*`, `?`, `[]`) of whole names: `*mlp.gate` is no child of it, nor `mlp.gate_proj`.

    inside  a plain name also covers the modules that lie in it
    """

    def __init__(self, what: str, patterns: Sequence[str], *, inside: bool = False) -> None:
        super().__init__(what, patterns)
        self._inside = inside
        globs = [p for p in self.patterns if not p.startswith("re:") and not _GLOB.isdisjoint(p)]
        self._compiled = {p: re.compile(fnmatch.translate(p)) for p in globs}
        self._any = re.compile("|".join(f"(?:{fnmatch.translate(p)})" for p in globs) or "(?!)")

    def _find_name(self, name: str) -> str | None:
        found = super()._find_name(name)
        if found is None and self._any.match(name):
            found = next(p for p, glob in self._compiled.items() if glob.match(name))
        while self._inside and found is None and name:
            name = name.rpartition(".")[0]
            found = name if name in self._exact else None
        return found

    def _names(self, pattern: str, name: str) -> bool:
        compiled = self._compiled.get(pattern)
        return pattern == name or (compiled is not None and compiled.match(name) is not None)


class SkipPatterns(Patterns):
    """Entries of transformers' modules_to_not_convert: whole components from the start or at the end of a name.

    `model.visual` is everything below it, `gate` is `mlp.gate` and never `mlp.gate_proj`, `model.layers.*.self_attn`
    is an expression (quantizers_utils.should_convert_module, transformers 5; there an end may cut a component).
    """

    def __init__(self, what: str, patterns: Sequence[str]) -> None:
        super().__init__(what, patterns)
        self._compiled: dict[str, re.Pattern[str]] = {}
        for p in self.patterns:
            try:
                self._compiled[p] = compile_pattern(rf"(?:{p.removeprefix('re:')})(?:(?<=\.)|(?=\.|$))")
            except (re.error, RecursionError, OverflowError) as bad:
                raise CheckpointError(f"{what}: {p!r} is neither a name nor a regular expression: {bad}") from None

    def _find_name(self, name: str) -> str | None:
        return next((p for p in self.patterns if self._names(p, name)), None)

    def _names(self, pattern: str, name: str) -> bool:
        return self._compiled[pattern].match(name) is not None or f".{name}".endswith(f".{pattern}")


def near_text(name: str, modules: Iterable[str], limit: int = 3) -> str:
    """Text with the module names that `name` is a substring of, or that are spelled alike; "" if there are none."""
    modules = list(modules)
    plain = name.removeprefix("re:")
    inside = [m for m in modules if plain and plain in m]
    if inside:
        more = f" and {len(inside) - limit} more" if len(inside) > limit else ""
        return f" (it is only a part of {', '.join(inside[:limit])}{more}; names must match whole)"
    leaf = plain.rpartition(".")[2]
    alike = [m for m in modules if m.rpartition(".")[2] == leaf][:500] or modules[:2000]
    close = difflib.get_close_matches(plain, alike, limit, 0.6)
    return f" (near: {', '.join(close)})" if close else ""
