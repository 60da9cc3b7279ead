"""The picture of a failing report for the documentation: `make docs-picture`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser.chromium import Browser
from browser.report_page import make


def main(target: Path) -> None:
    """Run, draw, look at 1000 pixels' width."""
    with tempfile.TemporaryDirectory() as folder:
        _, page = make("planted", Path(folder))
        browser = Browser()
        try:
            browser.open(page, 1000, 1080)
            browser.picture(target)
        finally:
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
