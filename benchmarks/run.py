"""Run every benchmark of this folder, each in its own process, and report which bars hold.

    python benchmarks/run.py [--only NAME ...]

Each benchmark prints its own table and exits with 1 if it misses a bar; this exits with 1 if any did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    names = sorted(p.stem for p in FOLDER.glob("*.py") if p.name != "run.py")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    missed = []
    for name in arguments.parse_args().only:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(FOLDER / f"{name}.py")]).returncode:
            missed.append(name)
        print(flush=True)
    print("every bar holds" if not missed else f"missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
