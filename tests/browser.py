"""A headless browser and a page of app.py in a process of its own, for tests and benchmarks."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from args_setting import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 180  # seconds for anything on the page; a busy machine is slow, and nothing is timed


def missing() -> str:
    """Why there is no browser to test with; empty if there is one."""
    try:
        import gradio  # noqa: F401
        import selenium  # noqa: F401
    except ImportError as error:
        return f"needs {error.name}, pip install -r requirements-dev.txt"
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        return "needs chromium and chromedriver (Debian: chromium and chromium-driver)"
    return ""


@contextmanager
def served(temporary: Path, *argv: str) -> Iterator[str]:
    """The address of a page in a process of its own, whose temporary files lie in `temporary`."""
    with running(temporary, *argv) as (address, _):
        yield address


@contextmanager
def running(temporary: Path, *argv: str, log: Path | None = None) -> Iterator[tuple[str, int]]:
    """The same, with the number of the process; `log` gets what it writes of errors."""
    command = [sys.executable, ROOT / "app.py", "--port", "0", *argv]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with (
        log.open("w") if log else nullcontext() as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process,
    ):
        try:
            line = process.stdout.readline()  # open ADDRESS in a browser; …
            if not line.startswith("open http"):
                raise RuntimeError(f"app.py did not start: {line}")
            yield line.split()[1], process.pid
        finally:
            process.terminate()
            process.wait(PATIENCE)


def children(pid: int) -> list[int]:
    """The processes behind a page, as Linux shows them; the first one is that for images."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(word) for path in found for word in path.read_text().split())


class Browser:
    """One user in front of the page: a session with its own folder of downloads."""

    def __init__(self, downloads: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        # no sandbox: it cannot start as root, and only our own page is opened
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
            options.add_argument(f"--{flag}")
        options.add_argument("--window-size=1400,1900")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        allowed = {"behavior": "allow", "downloadPath": str(downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
        self.driver.set_script_timeout(PATIENCE)
        self.downloads = downloads

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.wait(lambda: self.find("#fuse"))

    def find(self, selector: str):
        """The elements that a CSS selector finds."""
        return self.driver.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.wait(lambda: self.find(selector))
        self.driver.execute_script("arguments[0].click()", self.find(selector)[0])

    def upload(self, selector: str, path: Path) -> None:
        self.wait(lambda: self.find(f"{selector} input[type=file]"))
        self.find(f"{selector} input[type=file]")[0].send_keys(str(path))

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.find(selector))

    def picture(self, selector: str) -> str:
        """The address of the loaded picture inside of an element; empty if there is none."""
        script = """const i = document.querySelector(arguments[0] + ' img');
            return i && i.complete && i.naturalWidth ? i.src : ''"""
        return self.driver.execute_script(script, selector)

    def wait(self, happened):
        """What `happened()` returns, as soon as it is true."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := happened():
                    return found
            except WebDriverException:
                pass  # the page was changing under our hands
            time.sleep(0.05)
        seen = self.text("body")[:2000]
        raise TimeoutError(f"not within {PATIENCE} s; the page says: {seen}")

    def close(self) -> None:
        self.driver.quit()
