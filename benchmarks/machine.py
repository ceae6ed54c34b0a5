"""What a figure was measured on: the head of every benchmark's output."""

import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path


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
