"""Whose job is next on the page: one job at a time, and visitors take turns.

Jobs go in the order in which they came. But after a visitor's job has run, the visitor's other jobs
go behind those of everyone who waits by then. So whoever sends many jobs delays another visitor by
one of them. How long one may run is bounded where it runs.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator

import limits
from cli import UserError


class _Job:
    """A job that waits or runs."""

    def __init__(self, visitor: str, files: Collection[str], kind: str, since: int):
        self.visitor, self.files, self.kind = visitor, files, kind
        self.since = since  # its place in the order


class Turns:
    """The jobs that share one turn, from several threads."""

    def __init__(self, length: int = limits.WAITING, of_one: int = limits.WAITING_OF_ONE):
        """At most `length` jobs wait, and `of_one` of them of one visitor."""
        self.length, self.of_one = length, of_one
        self.changed = threading.Condition()
        self.waiting: list[_Job] = []
        self.running: _Job | None = None
        self.order = itertools.count()

    @contextlib.contextmanager
    def turn(
        self,
        visitor: str,
        files: Collection[str] = (),
        only: str = "",
        tell: Callable[[int], None] = lambda before: None,
    ) -> Iterator[None]:
        """Wait for a turn, and have it until the end of the `with`.

        Args:
            visitor: whose job it is.
            files: the paths it needs, which `in_use` names meanwhile. Their age begins anew when
                the turn ends, since neither a wait nor a job may make them old.
            only: the name of a kind of job, of which a visitor may have one in the queue.
            tell: gets how many jobs are before this one, whenever that changes.

        Raises:
            UserError: too many jobs wait, or this visitor's do.
        """
        with self.changed:
            job = self._enter(visitor, files, only)
            try:
                self._wait(job, tell)
            except BaseException:
                self.waiting.remove(job)
                self.changed.notify_all()
                raise
            self.waiting.remove(job)
            self.running = job
        try:
            yield
        finally:
            with self.changed:
                self._leave(job)

    def in_use(self) -> set[str]:
        """The files of the jobs that wait or run."""
        with self.changed:
            jobs = [*self.waiting, *filter(None, [self.running])]
            return {file for job in jobs for file in job.files}

    def _enter(self, visitor: str, files: Collection[str], only: str) -> _Job:
        own = [job for job in self.waiting if job.visitor == visitor]
        if only and any(job.kind == only for job in own):
            raise UserError("your last click still waits for its turn; one is enough")
        if len(own) >= self.of_one:
            raise UserError("too many of your clicks wait for their turn; wait for them first")
        if len(self.waiting) >= self.length:
            raise UserError("too many visitors wait for their turn; try again in some minutes")
        job = _Job(visitor, files, only, next(self.order))
        self.waiting.append(job)
        return job

    def _wait(self, job: _Job, tell: Callable[[int], None]) -> None:
        told = 0
        while before := self._before(job):
            if before != told:
                tell(before)
            told = before
            self.changed.wait()
        if told:
            tell(0)

    def _before(self, job: _Job) -> int:
        """How many jobs come before this one; the one that runs counts, too."""
        earlier = sum(other.since < job.since for other in self.waiting)
        return earlier + (self.running is not None)

    def _leave(self, job: _Job) -> None:
        self.running = None
        for other in self.waiting:
            if other.visitor == job.visitor:
                other.since = next(self.order)
        now = time.time()
        for file in job.files:
            with contextlib.suppress(OSError):  # it is gone, or it is not ours
                os.utime(file, (now, now))
        self.changed.notify_all()
