"""studies/child.py: a child may die in any way, and the next call works."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from cli import UserError
from studies.child import Bounds, Call, Child, DiedError, FaultError, is_lack_of_memory, signal_name

resource = pytest.importorskip("resource", reason="needs a system with limits of processes")
JOBS = "child_jobs:"
MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="holds memory as Linux does")


@pytest.fixture
def child(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    child = Child(bounds=Bounds(memory=256 * MB, file_bytes=MB, open_files=64))
    yield child
    child.close()


def run(child: Child, name: str, *args, seconds: float = 60, **how):
    return child.run(f"{JOBS}{name}", *args, seconds=seconds, **how)


def test_a_call_returns_and_the_child_stays(child):
    assert run(child, "double", 21) == 42
    first = run(child, "pid")
    assert first != os.getpid() and run(child, "pid") == first
    assert child.start() == ()
    child.close()
    assert run(child, "pid") != first


def test_errors_come_as_they_were_raised(child):
    with pytest.raises(UserError, match=r"^a\.png: damaged$") as error:
        run(child, "refuse", "a.png: damaged")
    assert not isinstance(error.value, DiedError)
    with pytest.raises(UserError, match="No such file"):
        run(child, "open_nothing")
    with pytest.raises(FaultError, match="KeyError: 'ours'") as fault:
        run(child, "fault")
    assert "in fault" in fault.value.trace
    with pytest.raises(FaultError, match="ModuleNotFoundError"):
        child.run("no_such_module:f", seconds=60)
    assert run(child, "double", 1) == 2


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGBUS"])
def test_a_child_that_dies_is_one_sentence_and_the_next_call_works(child, name):
    assert run(child, "double", 1) == 2
    with pytest.raises(DiedError, match=f"ended by {name}") as error:
        run(child, "die", name)
    assert error.value.ended_by == name and "\n" not in str(error.value)
    assert run(child, "double", 2) == 4


def test_one_that_leaves_or_was_killed_between_calls(child):
    with pytest.raises(DiedError, match="ended by exit code 3"):
        run(child, "leave", 3)
    os.kill(run(child, "pid"), signal.SIGKILL)
    time.sleep(0.2)
    assert run(child, "double", 2) == 4


def test_one_that_takes_too_long_is_ended(child):
    child.start()
    began = time.monotonic()
    with pytest.raises(DiedError, match="over 1 seconds and was ended") as error:
        run(child, "sleep", 600, seconds=1)
    assert error.value.ended_by == "time" and time.monotonic() - began < 30
    assert run(child, "sleep", 0) == "slept"


def test_the_clock_begins_anew_with_each_call(child):
    for _ in range(3):
        assert run(child, "sleep", 0.4, seconds=1) == "slept"


def test_cpu_time_is_bounded_where_nobody_watches_the_clock(child, monkeypatch):
    """As for a child whose caller was killed."""
    child.start()
    monkeypatch.setattr("limits.granted_cores", lambda: 1)

    class NoClock(threading.Timer):
        def __init__(self, seconds, action):
            super().__init__(600, action)

    monkeypatch.setattr(threading, "Timer", NoClock)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(DiedError, match=r"over 0\.5 seconds") as error:
        run(child, "burn", seconds=0.5)
    assert error.value.ended_by == "SIGXCPU"


@linux
def test_memory_is_bounded(child):
    assert run(child, "fill", 64) == 64 * MB
    with pytest.raises(UserError, match="more memory than it may take"):
        run(child, "fill", 512)
    assert run(child, "double", 2) == 4


def test_files_are_bounded(child, tmp_path):
    with pytest.raises(UserError, match="File too large"):
        run(child, "write", str(tmp_path / "large"), 2)
    assert (tmp_path / "large").stat().st_size <= MB
    with pytest.raises(UserError, match="Too many open files"):
        run(child, "open_many", 100)
    assert run(child, "limits_of_core")[0] == 0


def test_what_libraries_print_is_no_reply(child, capfd):
    assert run(child, "chatter") == "said"
    child.close()
    out, err = capfd.readouterr()
    assert not out and "so does C" in err


def test_what_is_told_comes_at_once_and_in_order(child):
    told = []
    assert run(child, "steps", 3, tell=lambda *what: told.append(what)) == "done"
    assert told == [(0, "step 0"), (1, "step 1"), (2, "step 2")]

    def stop(*what):
        raise RuntimeError("the visitor has gone")

    with pytest.raises(RuntimeError):
        run(child, "steps", 3, tell=stop)
    assert run(child, "double", 2) == 4, "the rest of the old reply is no reply to this call"


def test_a_reply_that_is_none_ends_the_child(child):
    with pytest.raises(DiedError):
        run(child, "lie")
    assert run(child, "double", 2) == 4


def test_a_child_is_prepared_before_its_limits_count(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    child = Child(Call("child_jobs:fill", (600,)), Bounds(memory=256 * MB))
    assert child.start() == ()
    child.close()
    wrong = Child(Call("child_jobs:refuse", ("no weights",)))
    for _ in range(2):
        with pytest.raises(UserError, match="no weights"):
            wrong.start()
    wrong.close()


def test_calls_from_several_threads_go_one_after_the_other(child):
    results = []
    threads = [
        threading.Thread(target=lambda k=k: results.append(run(child, "double", k)))
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2 * k for k in range(8)]


def test_a_busy_child_lets_nobody_wait_who_wants_it_ready(child):
    child.start()
    busy = threading.Thread(target=run, args=(child, "sleep", 2))
    busy.start()
    time.sleep(0.2)
    began = time.monotonic()
    child.begin()
    assert time.monotonic() - began < 1
    busy.join()


def test_one_that_is_closed_under_a_call_is_a_sentence(child):
    child.start()
    said = []

    def work():
        try:
            run(child, "sleep", 60)
        except UserError as error:
            said.append(str(error))

    busy = threading.Thread(target=work)
    busy.start()
    time.sleep(0.5)
    child.close()
    busy.join(60)
    assert len(said) == 1 and "ended by SIGKILL" in said[0]


def test_a_child_ends_with_the_process_that_started_it(child):
    pid = run(child, "pid")
    child.process.stdin.close()
    assert child.process.wait(60) == 0 and pid


def test_a_child_has_a_group_of_its_own_but_shares_the_session_of_its_caller(child):
    """So Ctrl-C of a terminal is not for it, and it gets its part of the processor."""
    pid = run(child, "pid")
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert os.getsid(pid) == os.getsid(0)


@pytest.mark.parametrize("chosen", ["", "active"])
def test_threads_of_a_child_sleep_while_they_wait_unless_the_user_chose(child, chosen, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    policy = child.run("os:getenv", "OMP_WAIT_POLICY", seconds=60)
    assert policy == (chosen or "passive")


def test_one_that_is_closed_before_it_has_begun_ends(child):
    child.begin()
    process = child.process
    closing = threading.Thread(target=child.close, daemon=True)
    closing.start()
    closing.join(60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for image."), True),
        (KeyError("x"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_what_libraries_say(error, lack):
    assert is_lack_of_memory(error) == lack


def test_a_signal_of_real_time_is_told_by_its_number():
    assert signal_name(signal.SIGSEGV) == "SIGSEGV"
    assert signal_name(40) == "signal 40"
