"""A piece of gpu.py under way: its folder, its log, and the scripts that it calls."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "figures.json"  # in a piece's folder, what its benchmark has found so far


class StoppedError(Exception):
    """A piece that came to no end in its time and goes on when it is called again."""


@dataclass
class Piece:
    """A piece under way."""

    name: str
    args: argparse.Namespace
    commands: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @property
    def folder(self) -> Path:
        return self.args.work / self.name

    def left(self) -> float:
        """Seconds until the piece has to end."""
        return self.started + self.args.limit - time.time()

    def start(self, *command: object, env: dict | None = None) -> subprocess.Popen:
        """Start a Python script of the project; what it prints goes to the piece's log."""
        words = [str(word) for word in command]
        self.commands.append(" ".join(["python", *words]))
        with (self.args.work / "logs" / f"{self.name}.log").open("a") as log:
            log.write(f"\n$ python {' '.join(words)}\n")
            log.flush()
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
            )

    def call(self, *command: object, env: dict | None = None) -> None:
        """Run a Python script of the project to its end; ValueError if it fails."""
        child = self.start(*command, env=env)
        name = command[1] if command[0] == "-m" else command[0]
        try:
            code = child.wait(max(1.0, self.left()))
        except subprocess.TimeoutExpired:
            raise StoppedError(f"{name} was not done in time") from None
        finally:
            end(child)
        if code:
            raise ValueError(f"{name} ended with {code}: {self.last_line()}")

    def last_line(self) -> str:
        lines = (self.args.work / "logs" / f"{self.name}.log").read_text().split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[-300:]

    def figures(self, script: str, *command: object) -> dict:
        """Run a benchmark that writes JSON as it goes, and return that."""
        path = self.folder / FIGURES
        self.call(f"benchmarks/{script}", *command, "--DEVICE", self.args.DEVICE, "--json", path)
        return json.loads(path.read_text())


def end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
