"""Dask's side of a study: the processes of this machine, how one died, and cases as they end.

A worker may be killed by the system, by a crash of a library, or by Dask for its memory. Of the
processes of this machine the operating system tells which. Dask's nannies, which start workers and
start them anew, run in the process of the study itself, so they can be asked. A cluster only tells
if a nanny has ended a worker for its memory.

Sources: the documentation of distributed (nanny, events of the scheduler, as_completed), signal(7).
"""

import asyncio
import time
from collections.abc import Callable, Iterator

from distributed import Client, Future, KilledWorker, Nanny, as_completed
from distributed.process import AsyncProcess

from studies.child import signal_name

STARTED: dict[int, AsyncProcess] = {}  # by id: every process of a worker here
START = 0.01  # seconds between two looks for a process that starts
PATIENCE = 5  # seconds that the system may take to tell how a process has ended
POLL = 0.1  # seconds between two looks for a case that has ended
LOOK = 2.0  # seconds between two looks for workers
REMIND = 60.0  # seconds until it is said again that there are none
BY_MEMORY = "worker-restart-memory"  # Dask's topic of workers that were ended for their memory
MORE_MEMORY = "take fewer --jobs, a larger --memory, or --tile for volumes"
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")


class RememberingNanny(Nanny):
    """Dask's nanny, which also remembers each process of its worker in STARTED."""

    async def instantiate(self):
        """Start a process for the worker, as Dask's own does."""
        remembering = asyncio.ensure_future(self._remember())
        try:
            return await super().instantiate()
        finally:
            remembering.cancel()

    async def _remember(self) -> None:
        """Look for the process while it starts, as a case may kill it before it is told of."""
        while True:
            process = self.process and self.process.process
            if process and process.pid:
                STARTED[process.pid] = process
            await asyncio.sleep(START)


def death_of(client: Client, error: KilledWorker) -> str:
    """How the worker of a case has died, and what to do: one line."""
    worker, times = error.last_worker, error.allowed_failures + 1
    often = "twice" if times == 2 else f"{times} times" if times > 1 else "once"
    here = STARTED.get(worker.pid)
    why = ending(here) if here else (
        "its cluster does not tell how; see the log of the worker at " + worker.address
    )  # fmt: skip
    if (worker.address, worker.pid) in ended_for_memory(client):  # asked last, as it may come late
        share = f"{worker.memory_limit / 1e9:.1f} GB" if worker.memory_limit else "its share"
        why = f"it used more than {share} of memory; {MORE_MEMORY}"
    return f"its worker died {often}: {why}"


def ended_for_memory(client: Client) -> set[tuple[str, int]]:
    """Address and id of each worker that a nanny has ended because of its memory."""
    events = (event for _, event in client.get_events(BY_MEMORY))
    return {(event.get("worker"), event.get("pid")) for event in events}


def ending(process: AsyncProcess) -> str:
    """How a process of this machine has ended, and what to do."""
    end = time.monotonic() + PATIENCE
    while process.exitcode is None and time.monotonic() < end:
        time.sleep(POLL)
    code = process.exitcode
    if code is None:
        return "the system does not tell how"
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal_name(-code)
    if name == "SIGKILL":
        return f"killed (SIGKILL), as the system does for lack of memory; {MORE_MEMORY}"
    if name in CRASHES:
        return (
            f"a library crashed on one of its sources ({name}); export the source again, or in "
            "another format"
        )
    return f"ended by {name}, which somebody or the system has sent"


def as_they_end(
    client: Client, futures: list[Future], tell: Callable[[str], None]
) -> Iterator[Future]:
    """Futures in the order in which they end.

    `tell` gets a line while the cluster has no worker, at first and once a minute.
    """
    left = as_completed(futures)
    look, told = time.monotonic(), -REMIND
    while left.count():
        if left.has_ready():
            yield next(left)
            continue
        now = time.monotonic()
        if now >= look:
            look = now + LOOK
            if workers_of(client):
                told = -REMIND
            elif now - told >= REMIND:
                told = now
                tell(waiting_line(client))
        time.sleep(POLL)


def workers_of(client: Client) -> int:
    """How many workers the cluster has; 1 if it does not answer, as its cases say so then."""
    try:
        return len(client.nthreads())
    except OSError:
        return 1


def waiting_line(client: Client) -> str:
    """What to do while a cluster has no worker."""
    address = client.scheduler.address
    return f"waiting for workers: start some by `dask worker {address} --nthreads 1`"
