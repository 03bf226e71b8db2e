"""Make the pictures of a report for the README: ``docs/report.png`` and ``docs/report-dark.png``, from a real run.

    make demo && .venv/bin/python docs/screenshot.py runs/demo/report.html

It needs Chromium (Debian: ``apt-get install chromium``), and fails where a picture would be larger than 200 KB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
WIDTH, HEIGHT, LARGEST = 1150, 700, 200_000  # pixels, pixels, bytes
# 0 is dark: https://source.chromium.org, PreferredColorScheme. A headless browser reports light otherwise.
SCHEMES = {"report.png": "1", "report-dark.png": "0"}


def shoot(browser: str, report: Path, target: Path, scheme: str, height: int) -> None:
    """One picture of the top of the page."""
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile) / "report.html"
        text = report.read_text(encoding="utf-8").replace(f"{DOCS.parent}/", "")  # no path of this computer
        page.write_text(text, encoding="utf-8")
        command = [
            browser,
            "--headless=new",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        command += [f"--window-size={WIDTH},{height}", f"--blink-settings=preferredColorScheme={scheme}"]
        command += ["--virtual-time-budget=2000", f"--screenshot={target}", page.as_uri()]
        command += ["--no-sandbox"] * (os.geteuid() == 0)  # Chromium has no sandbox for root
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    size = target.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{target.name}: {size:,} bytes, wanted at most {LARGEST:,}; give a smaller --height")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels from the top (default: %(default)s)")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium was found; install it (Debian: apt-get install chromium)")
    for name, scheme in SCHEMES.items():
        shoot(browser, arguments.report.resolve(), DOCS / name, scheme, arguments.height)
        print(f"docs/{name}: {(DOCS / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
