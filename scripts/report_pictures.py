"""Takes the pictures of docs/report.md in headless Chromium: report_pictures.py RUN [OTHER …].

RUN is shown alone, in light and dark; all of them are compared. Needs chromium and Pillow.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from trainer import reporting

FOLDER = Path(__file__).resolve().parents[1] / "docs/img"
WIDTH = 1280
DARK = "--blink-settings=preferredColorScheme=0"


def take(page: Path, name: str, top: int, bottom: int, *flags: str) -> None:
    """Write a stretch of a page as a small PNG."""
    with tempfile.TemporaryDirectory() as folder:
        screenshot = Path(folder) / "page.png"
        subprocess.run(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
                f"--window-size={WIDTH},{bottom}", f"--screenshot={screenshot}", *flags,
                page.as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        picture = Image.open(screenshot).convert("RGB").crop((0, top, WIDTH, bottom))
        picture.quantize(128, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size:,} bytes")


def main(runs: list[str]) -> None:
    """Take the three pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(reporting.write(runs[:1], f"{folder}/report.html"))
        take(page, "report-light.png", 0, 1490)
        take(page, "report-dark.png", 1890, 2860, DARK)
        page = Path(reporting.write(runs, f"{folder}/compare.html"))
        take(page, "report-compare.png", 0, 1540)


if __name__ == "__main__":
    main(sys.argv[1:])
