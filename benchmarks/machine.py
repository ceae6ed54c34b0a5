"""What every benchmark shares, to be imported first: it is no command of its own.

It makes the modules of the project and of its tests importable, and says what a figure was measured
on: `python benchmarks/brightness.py …` and the others print that as the head of their output.
"""

import os
import platform
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]

from cli import OneLineParser  # noqa: E402


def machine(*packages: str) -> str:
    """Processor, versions of the packages that matter, date and command line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; "
        f"{date.today()}; {command}"
    )


def peak_gb() -> float:
    """Largest resident set of this process on Linux; getrusage may give its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1e6


def make_parser(description: str) -> ArgumentParser:
    """A command line without flags, whose help is the docstring as it stands."""
    return OneLineParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """A whole number from 1 up, for a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}, expected a whole number from 1 up")
    return int(text)
