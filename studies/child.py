"""A process of its own for work on files from outside: it may fail, and it may take so much.

A library that reads a strange file may crash, never end, or fill the memory. So the page, and each
case of a study, has that work done by a child process. `Child.run` names a function of the house.
The child imports it, calls it, and stays for the next call with all it has loaded. If it dies, or
takes too long and is killed, the caller gets one sentence, and the next call starts a new child.

The system holds the limits, by setrlimit(2): addresses of memory, seconds of CPU for each call,
bytes of a file that it writes, open files, and no core dump. Where the system has none, as on
Windows, the clock alone is left, and `Child.start` tells so. A child is no sandbox: it has the
rights of the user who runs it.

It is started by `subprocess`, since Dask's workers may not fork through multiprocessing. Calls go
to it as pickles. Replies come back as lines of JSON: whoever took the child over could put code
into a pickle.
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import limits
from args_setting import ROOT
from cli import UserError

START_SECONDS = 600  # until a child is ready, on a machine that is busy
REPLY_BYTES = 2**22  # of a line that it may send
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from studies.child import serve; serve()"
# Threads of a pass that wait for each other sleep, as the caller and a browser want the processor.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


class Call(NamedTuple):
    """A function of the house and what it gets."""

    function: str  # as "module:name"
    args: tuple = ()


@dataclass(frozen=True)
class Bounds:
    """What the system lets a child take."""

    memory: int = 0  # bytes of addresses beyond those it has when it is ready; 0: any number
    file_bytes: int = limits.CHILD_FILE_BYTES  # of a file that it writes
    open_files: int = limits.CHILD_OPEN_FILES


class DiedError(UserError):
    """The child ended before it had replied."""

    def __init__(self, message: str, ended_by: str):
        super().__init__(message)
        self.ended_by = ended_by  # a signal, such as "SIGSEGV"; "time"; or "exit code 1"


class FaultError(Exception):
    """An error in the child that is ours; `trace` is its traceback."""

    def __init__(self, message: str, trace: str):
        super().__init__(message)
        self.trace = trace


# --- in the process that has the work done ---------------------------------------------------


class Child:
    """A process that does one call after the other; from several threads, one at a time."""

    def __init__(self, prepare: Call | None = None, bounds: Bounds | None = None):
        """`prepare` is called in each new child, before its limits count."""
        self.prepare, self.bounds = prepare, bounds or Bounds()
        self.process: subprocess.Popen | None = None
        self.ready, self.lacks = False, ()
        self.turn = threading.Lock()

    def begin(self) -> None:
        """Have a child get ready, without waiting for anything; a busy one is ready."""
        if self.turn.acquire(blocking=False):
            try:
                self._begin()
            finally:
                self.turn.release()

    def start(self) -> tuple[str, ...]:
        """Wait until a child is ready; returns the limits that the system does not have.

        Raises what `prepare` raised, as `run`.
        """
        with self.turn:
            self._start()
            return self.lacks

    def run(
        self,
        function: str,
        *args: Any,
        seconds: float,
        tell: Callable[..., None] | None = None,
    ) -> Any:
        """What a function returns in the child; it is made of what JSON has.

        Args:
            function: as "module:name".
            seconds: after which the child is killed.
            tell: gets what the function gives to its own argument `tell`, as it comes.

        Raises:
            UserError: as the function raised it; so does an OSError, or a lack of memory.
            DiedError: the child died or took too long.
            FaultError: any other error of the function.
        """
        with self.turn:
            self._start()
            return self._ask((Call(function, args), seconds, tell is not None), seconds, tell)

    def close(self) -> None:
        """End the child, whatever it does."""
        process = self.process
        if process is not None:
            self._kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what it has not read
                process.stdin.close()
            self.process = None

    def _begin(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT | os.environ,
        )
        with contextlib.suppress(OSError):  # it died: `_start` tells
            pickle.dump((self.prepare, self.bounds), self.process.stdin)
            self.process.stdin.flush()

    def _start(self) -> None:
        self._begin()
        if not self.ready:
            try:
                self.lacks = tuple(self._ask(None, START_SECONDS))
            except BaseException:
                self.close()
                raise
            self.ready = True

    def _ask(self, request: tuple | None, seconds: float, tell: Callable | None = None) -> Any:
        """The reply to a request; to None, the first reply."""
        process, late = self.process, threading.Event()
        clock = threading.Timer(seconds, lambda: (late.set(), self._kill()))
        clock.daemon = True
        clock.start()
        try:
            if request is not None:
                with contextlib.suppress(OSError, ValueError):  # it died, or was closed: no reply
                    pickle.dump(request, process.stdin)
                    process.stdin.flush()
            kind, content = _reply(process)
            while kind == "told":
                tell(*content)
                kind, content = _reply(process)
        except _NoReplyError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # a reply that is none comes from one that lives
            self.close()
            raise death(process.returncode, seconds, late.is_set()) from None
        except BaseException:  # of `tell`, or Ctrl-C: nobody waits for this reply
            self.close()
            raise
        finally:
            clock.cancel()
            clock.join()
            if late.is_set():  # maybe at the moment of the reply
                self.close()
        if kind == "done":
            return content
        raise UserError(content) if kind == "refused" else FaultError(*content)

    def _kill(self) -> None:
        """Kill the child, and what it has started."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # one that has just begun has no group yet


def death(code: int, seconds: float, late: bool) -> DiedError:
    """Why a child did not reply.

    Args:
        code: its return code; less than 0: the signal that ended it.
        seconds: that it had.
        late: whether they had passed.
    """
    ended_by = signal_name(-code) if code < 0 else f"exit code {code}"
    if late or ended_by == "SIGXCPU":
        text = f"it took over {seconds:g} seconds and was ended; make it smaller"
        return DiedError(text, "time" if late else ended_by)
    if ended_by == "SIGKILL":
        why = "most likely as memory ran out; make it smaller"
    else:
        why = "a file is damaged, or a library has a fault; export it again"
    return DiedError(f"the process that worked on it ended by {ended_by}: {why}", ended_by)


def _reply(process: subprocess.Popen) -> tuple[str, Any]:
    """The kind and content of the next line of a child."""
    try:
        kind, content = json.loads(process.stdout.readline(REPLY_BYTES))
    except (ValueError, RecursionError):
        raise _NoReplyError from None
    return kind, content


def signal_name(number: int) -> str:
    """A signal's name, such as SIGSEGV; "signal 40" for one of real time, which has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _NoReplyError(Exception):
    """The child sent no reply, or one that cannot be read."""


# --- in the child ----------------------------------------------------------------------------


def serve() -> None:
    """Answer calls until there are no more; what a child runs."""
    # A group of its own, so that Ctrl-C is for the caller alone. It is no session of its own, since
    # Linux may share the processor by sessions: beside a browser a call then took twice as long.
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # what a library prints is no reply
    prepare, bounds = pickle.load(requests)
    first = _outcome(prepare, replies) if prepare else ("done", None)
    if first[0] != "done":
        _send(replies, *first)
        return
    _send(replies, "done", bound(bounds))
    while True:
        try:
            call, seconds, tells = pickle.load(requests)
        except EOFError:  # the caller has ended
            return
        bound_cpu(seconds)
        _send(replies, *_outcome(call, replies, tells))


def _outcome(call: Call, replies: BinaryIO, tells: bool = False) -> tuple[str, Any]:
    """The kind and content of a reply: what a call returned, or how it failed."""
    more = {"tell": lambda *what: _send(replies, "told", what)} if tells else {}
    try:
        module, name = call.function.split(":")
        function = getattr(importlib.import_module(module), name)
        return "done", function(*call.args, **more)
    except (UserError, OSError) as error:
        return "refused", str(error)
    except Exception as error:
        if is_lack_of_memory(error):
            return "refused", "it needs more memory than it may take; make it smaller"
        return "fault", (f"{type(error).__name__}: {error}", traceback.format_exc())


def _send(replies: BinaryIO, kind: str, content: Any) -> None:
    replies.write(json.dumps([kind, content]).encode() + b"\n")
    replies.flush()


def is_lack_of_memory(error: Exception) -> bool:
    """Whether a library failed since it got no memory; each one says so in its own way."""
    told = re.search(r"alloc|insufficient memory|out of memory|start new thread", str(error), re.I)
    return isinstance(error, MemoryError) or bool(told)


def bound(bounds: Bounds) -> list[str]:
    """Set the limits of this process; returns the names of those that the system does not have."""
    with contextlib.suppress(OSError):  # where memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("500")
    try:
        import resource  # not on Windows
    except ImportError:
        return ["memory", "CPU time", "files"]
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, bounds.file_bytes)
    _lower(resource.RLIMIT_NOFILE, bounds.open_files)
    if not bounds.memory:
        return []
    addresses = limits.number((limits.words(Path("/proc/self/statm")) or [""])[0])
    torch = sys.modules.get("torch")
    if not addresses or (torch and torch.cuda.is_initialized()):  # CUDA reserves all there are
        return ["memory"]
    _lower(resource.RLIMIT_AS, addresses * os.sysconf("SC_PAGE_SIZE") + bounds.memory)
    return []


def bound_cpu(seconds: float) -> None:
    """Let this process take so many more seconds on all the cores that it may use."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    more = seconds * limits.granted_cores() + 1
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + more))


def _lower(kind: int, most: int) -> None:
    """Set a limit for this process, at most the one that it may not exceed."""
    import resource  # not on Windows

    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))
