"""What the tests of studies/child.py have a child do; it imports this file by its name."""

import os
import signal
import time
from pathlib import Path

from cli import UserError


def double(number: float) -> float:
    return 2 * number


def pid() -> int:
    return os.getpid()


def refuse(text: str) -> None:
    raise UserError(text)


def open_nothing() -> None:
    Path("/nowhere/at/all").read_bytes()


def fault() -> None:
    raise KeyError("ours")


def die(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(60)


def leave(code: int) -> None:
    os._exit(code)


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def burn() -> None:
    while True:
        pass


def fill(megabytes: int) -> int:
    return len(bytes(megabytes * 2**20))


def write(path: str, megabytes: int) -> None:
    Path(path).write_bytes(bytes(megabytes * 2**20))


def open_many(count: int) -> int:
    return len([os.dup(0) for _ in range(count)])


def chatter() -> str:
    print("a library says something")
    os.write(1, b"and so does C\n")
    return "said"


def steps(count: int, tell) -> str:
    for step in range(count):
        tell(step, f"step {step}")
    return "done"


def lie() -> object:
    """A reply that is none."""
    return float("nan"), "x" * 2**23


def limits_of_core() -> list[int]:
    import resource

    return list(resource.getrlimit(resource.RLIMIT_CORE))
