"""The process of hostile_reader.py, from the side of the tests."""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

START = 600  # s that the process may take to load on a machine that is busy
PATIENCE = 120  # s that a file may take there, before the process is ended
ROOT = Path(__file__).parents[1]


class Reader:
    """A process that reads one file after the other; a new one takes the place of one that died."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def __call__(self, reader: str, path: Path) -> dict:
        """What hostile_reader.py tells of a file; outcome "died" if the process did not live on."""
        if self.process is None or self.process.poll() is not None:
            self._begin()
        self.process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self.process.stdin.flush()
        line = self._answer()
        if line:
            return json.loads(line)
        self.close()
        said = f"it ended with {self.process.returncode}"
        return {"outcome": "died", "said": said, "seconds": 0, "megabytes": 0, "pixels": False}

    def _begin(self) -> None:
        script = ROOT / "tests" / "hostile_reader.py"
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{script.parent}"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, script], env=env, cwd=ROOT, **pipes)
        assert self._answer(START)

    def _answer(self, seconds: float = PATIENCE) -> str:
        """The next line; empty where none comes in time."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if waiting.select(seconds) else ""

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # waits for its end, and closes its pipes
