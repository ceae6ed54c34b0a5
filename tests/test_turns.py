"""webpage/turns.py: whose job is next, who has to wait, and what stays meanwhile."""

import threading
import time

import pytest

import app
from cli import UserError
from webpage.turns import Turns


class Jobs:
    """Jobs in threads of their own. Each runs until it is let go, so that the order is known."""

    def __init__(self, turns: Turns):
        self.turns, self.order, self.threads = turns, [], []
        self.go = threading.Semaphore(0)

    def add(self, name: str, visitor: str, **how) -> None:
        """A job, once it waits or runs."""
        known = self.count()

        def work():
            with self.turns.turn(visitor, **how):
                self.order.append(name)
                self.go.acquire()

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()
        self.until(lambda: self.count() > known)

    def count(self) -> int:
        with self.turns.changed:
            return len(self.turns.waiting) + (self.turns.running is not None) + len(self.order)

    def until(self, happened) -> None:
        end = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.005)

    def finish(self) -> list[str]:
        for _ in self.threads:
            self.go.release()
        for thread in self.threads:
            thread.join(60)
        return self.order


@pytest.fixture
def jobs():
    return Jobs(Turns(length=6, of_one=4))


def test_who_sends_many_delays_another_by_one_job(jobs):
    for name in ("a1", "a2", "a3", "a4"):
        jobs.add(name, "a")
    jobs.add("b1", "b")
    jobs.add("c1", "c")
    assert jobs.finish() == ["a1", "b1", "c1", "a2", "a3", "a4"]


def test_a_second_click_is_refused_while_the_first_waits(jobs):
    jobs.add("b", "b")
    jobs.add("a1", "a", only="fuse")
    with pytest.raises(UserError, match="your last click still waits"):
        jobs.turns.turn("a", only="fuse").__enter__()
    jobs.add("a2", "a")  # of another kind
    jobs.add("c", "c", only="fuse")
    assert sorted(jobs.finish()) == ["a1", "a2", "b", "c"]
    with jobs.turns.turn("a", only="fuse"):  # it does not wait, so another one may
        pass


def test_the_queue_has_a_length_for_one_and_for_all(jobs):
    for k in range(5):
        jobs.add(f"a{k}", "a")  # one runs, four wait
    with pytest.raises(UserError, match="too many of your clicks"):
        jobs.turns.turn("a").__enter__()
    for visitor in "bc":
        jobs.add(visitor, visitor)
    with pytest.raises(UserError, match="too many visitors wait"):
        jobs.turns.turn("d").__enter__()
    assert len(jobs.finish()) == 7
    with jobs.turns.turn("d"):
        pass


def test_the_position_is_told_as_it_changes(jobs):
    told = []
    jobs.add("a", "a")
    jobs.add("b", "b")
    jobs.add("c", "c", tell=told.append)
    jobs.until(lambda: told == [2])
    jobs.finish()
    assert told in ([2, 1, 0], [2, 0])
    with jobs.turns.turn("d", tell=told.append):
        pass
    assert len(told) <= 3, "who does not wait is told nothing"


def test_a_wait_that_is_broken_off_leaves_the_queue(jobs):
    def gone(before):
        raise RuntimeError("the visitor has gone")

    jobs.add("a", "a")
    with pytest.raises(RuntimeError):
        jobs.turns.turn("b", tell=gone).__enter__()
    assert not jobs.turns.waiting
    jobs.finish()
    with pytest.raises(KeyError), jobs.turns.turn("b"):
        raise KeyError
    with jobs.turns.turn("c"):
        pass


def test_what_waits_does_not_grow_old(jobs, tmp_path):
    file, folder, other = tmp_path / "scan.png", tmp_path / "views", tmp_path / "old.png"
    folder.mkdir()
    for path in (file, folder / "1.npy", other):
        path.write_text("")
    jobs.add("b", "b")
    jobs.add("a", "a", files=[str(file), str(folder)])
    time.sleep(0.6)
    app.sweep(tmp_path, 0.5, [jobs.turns])
    assert file.exists() and (folder / "1.npy").exists() and not other.exists()
    jobs.finish()
    assert jobs.turns.in_use() == set()
    app.sweep(tmp_path, 0.5, [jobs.turns])
    assert file.exists(), "its age begins anew when its job ends"
    assert time.time() - file.stat().st_ctime < 60
    time.sleep(0.6)
    app.sweep(tmp_path, 0.5, [jobs.turns])
    assert not file.exists()
