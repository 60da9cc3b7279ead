"""Where the command `qhal` starts: is this our `qhal`, and what do errors become.

Exit codes: 0 ok, 1 the thing asked failed, 2 wrong use.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import packages_distributions


def main() -> None:
    """Run the command line; one clear line instead of a traceback for every error that has a name."""
    try:
        from qhal.errors import QhalError
        from qhal_cli.app import app
    except ImportError as error:
        owners = packages_distributions().get("qhal", [])
        shadow = sys.modules.get("qhal")
        where = getattr(shadow, "__file__", None) or "an unknown place"
        _stop(
            f"the import name 'qhal' does not give this project: {error}\n"
            f"  found: {where} (installed distributions that own it: {', '.join(owners) or 'none'})\n"
            "  do: pip uninstall -y qhal && pip install --force-reinstall --no-deps qhal-core"
        )
    warnings.showwarning = _note  # type: ignore[assignment]  # it takes what warnings passes, by position
    try:
        app()
    except QhalError as error:
        _stop(f"{type(error).__name__}: {error}")
    except BrokenPipeError:  # the reader of a pipe went away: not an error of ours
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # files of ours have errors with names; what is left is the result on stdout
        _stop(f"cannot print the result: {error}\n  what was written with --out is complete")
    except KeyboardInterrupt:
        _stop("interrupted; nothing was left half written", code=130)


def _note(message: Warning | str, *_: object) -> None:
    """A warning is a line for people, without the place in our code that raised it."""
    print(f"qhal: note: {message}", file=sys.stderr)


def _stop(message: str, code: int = 1) -> None:
    print(f"qhal: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
