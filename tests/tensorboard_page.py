"""Opens TensorBoard's Time Series page of a log in a browser without a screen, and keeps a picture of it.

    python tests/tensorboard_page.py runs/digits examples/tensorboard.png

It needs Chromium, Debian's package `chromium` for one.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# WebGL is off, so that TensorBoard draws its lines as SVG, which shows in the page's text.
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--window-size=1700,1250", "--virtual-time-budget=30000"),
)


def find_browser() -> str | None:
    """The first browser that is there."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def _served(log: Path) -> Iterator[str]:
    """The address of a TensorBoard of the log; port 0 lets it find a free one."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            found = (re.search(r"http://\S+", line) for line in server.stderr)
            yield next(match[0] for match in found if match)
        finally:
            server.terminate()


def _browse(*arguments: str) -> str:
    """What the browser prints."""
    browser = find_browser()
    assert browser, f"none of {BROWSERS} is there"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *_OPTIONS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def time_series(log: Path, picture: Path) -> str:
    """Writes a picture of the Time Series page of a log, and returns the page as it stands in the browser."""
    with _served(log) as address:
        _browse(f"--screenshot={picture}", f"{address}#timeseries")
        return _browse("--dump-dom", f"{address}#timeseries")


if __name__ == "__main__":
    time_series(Path(sys.argv[1]), Path(sys.argv[2]))
