"""study.py with workers: they die, the run dies, and another cluster gives the same files."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import dying
import pytest
from study_files import rows_of, write_study, written

pytest.importorskip("distributed", reason="needs requirements-study.txt")
from distributed import KilledWorker, LocalCluster
from distributed.comm import CommClosedError

import limits
import study
from args_setting import ROOT, StudyArgs
from cli import UserError, parse_args
from studies import workers as study_workers
from studies.cases import RECORDS
from studies.run import run_case
from studies.workers import death_of

PATIENCE = 300  # seconds for a start or an end; a busy machine is slow


def start(*argv, log: Path) -> subprocess.Popen:
    """study.py in a process of its own, which hears Ctrl-C.

    A shell has what it starts in the background ignore it, and the children inherit that.
    """
    command = [str(word) for word in (sys.executable, ROOT / "study.py", *argv)]
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("w") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, cwd=log.parent, start_new_session=True
            )
    finally:
        signal.signal(signal.SIGINT, ignored)


def records_of(out: Path) -> dict[str, int]:
    """When each case was written down as done, in ns."""
    paths = sorted((out / RECORDS).glob("*.json"))
    return {p.stem: p.stat().st_mtime_ns for p in paths if '"done"' in p.read_text()}


def wait_for(what, process: subprocess.Popen | None = None) -> None:
    """Wait until `what()` is true, or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not what() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The ids of a study's workers: its children that run Dask, but not their resource tracker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
            if parent == process.pid and b"spawn_main" in command:
                found.append(int(path.parent.name))
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def plain_loop(table: Path, out: Path) -> dict[str, bytes]:
    """What a study should write, fused one by one in this process."""
    for case in study.cases_of(StudyArgs(table=table, out=out, threads=1))[1]:
        run_case(case.packed())
    return written(out)


def test_workers_and_runs_that_are_killed_leave_nothing_behind(tmp_path):
    table, broken = write_study(tmp_path / "in", 8)
    check_kills(tmp_path, table, broken, rounds=2, count=8)


def test_ctrl_c_ends_a_run_in_one_line_and_leaves_no_process(tmp_path):
    table, _ = write_study(tmp_path / "in", 120)  # more than are done before the signal comes
    argv = [table, "--out", tmp_path / "out", "--jobs", 2, "--threads", 1]
    process = start(*argv, log=tmp_path / "log")
    wait_for(lambda: records_of(tmp_path / "out"), process)
    victims = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the run and its workers
    assert process.wait(PATIENCE) == 130
    text = (tmp_path / "log").read_text()
    assert "\nstopped; start again to go on\n" in text and "Traceback" not in text
    assert len(victims) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in victims)
    assert "117 of 120" not in text and not list((tmp_path / "out").rglob("*.part"))
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_sixty_cases_and_ten_kills(tmp_path):
    table, broken = write_study(tmp_path / "in", 60)
    check_kills(tmp_path, table, broken, rounds=10, count=60)


def check_kills(folder: Path, table: Path, broken: set[str], rounds: int, count: int) -> None:
    """Kill a worker and the run by turns, at random moments; then finish.

    After many rounds it is started once more, with nothing left to do.
    """
    dice = random.Random(0)
    expected = plain_loop(table, folder / "expected")
    out, log = folder / "out", folder / "log"
    argv = [table, "--out", out, "--jobs", 2, "--threads", 1]
    process, before, step = None, {}, max(1, (count - 10) // rounds)
    for turn in range(rounds):
        if process is None:
            process = start(*argv, log=log)
        goal = len(before) + dice.randint(1, step)
        wait_for(lambda goal=goal: len(records_of(out)) >= goal, process)
        time.sleep(dice.random())
        assert before.items() <= records_of(out).items(), "a case that was done was done again"
        before = records_of(out)
        victims = workers_of(process)
        if turn % 2 == 0 and victims:
            kill(dice.choice(victims))
            continue
        process.kill()
        process.wait()
        wait_for(lambda victims=victims: not any(Path(f"/proc/{pid}").exists() for pid in victims))
        before, process = records_of(out), None
    if process:
        process.wait(PATIENCE)
    for again in (False, True) if rounds > 2 else (False,):
        process = start(*argv, log=log)
        assert process.wait(PATIENCE) == 2, log.read_text()
        assert before.items() <= records_of(out).items(), "a case that was done was done again"
        before = records_of(out)
        assert written(out) == expected
        rows = rows_of(out)
        assert {name for name in rows if rows[name]["status"] == "failed"} == broken
        assert f"{count - 3} of {count} cases done" in log.read_text()
        if again:
            assert f"{count - 3} of them before" in log.read_text()
    text = log.read_text()
    assert all(f"{name}: failed: " in text for name in broken)
    assert f"3 of {count} cases failed" in text.splitlines()[-1]


def test_another_cluster_gives_the_same_files(tmp_path):
    table, broken = write_study(tmp_path / "in", 5)
    expected = plain_loop(table, tmp_path / "expected")
    file, env = tmp_path / "scheduler.json", os.environ | {"PYTHONPATH": str(ROOT)}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    dask += ["--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
    worker += ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster = [subprocess.Popen(dask, cwd=tmp_path, **quiet)]
    try:
        wait_for(file.is_file)
        cluster += [subprocess.Popen(worker, cwd=tmp_path, **quiet)]
        argv = [table, "--out", tmp_path / "out", "--threads", 1]
        process = start(*argv, "--scheduler-file", file, log=tmp_path / "log")
        assert process.wait(PATIENCE) == 2, (tmp_path / "log").read_text()
        address = re.search(r"tcp://127.0.0.1:\d+", file.read_text())[0]
        process = start(*argv, "--scheduler", address, log=tmp_path / "log2")
        assert process.wait(PATIENCE) == 2
    finally:
        for process in cluster:
            process.kill()
            process.wait()
    assert f"cluster at {address}" in (tmp_path / "log").read_text()
    assert "2 of 5 cases done, 2 of them before" in (tmp_path / "log2").read_text()
    assert written(tmp_path / "out") == expected and broken <= rows_of(tmp_path / "out").keys()


def records_of_dying(folder: Path, **given) -> dict[str, dict]:
    """The records of four cases on one worker of this machine, which some of them kill."""
    table, _ = write_study(folder, 4)
    args, jobs = study.shares(StudyArgs(table=table, out=folder / "out", jobs=1, **given))
    _, cases = study.cases_of(args)
    records = {}
    with study.workers(args, jobs) as client:
        study.fuse_all(client, cases[1:] + cases[:1], records)
    return records


DEATHS = {
    "SIGKILL": r"killed \(SIGKILL\), as the system does for lack of memory; take fewer --jobs",
    "SIGSEGV": r"a library crashed on one of its sources \(SIGSEGV\); export the source again",
    "SIGTERM": "ended by SIGTERM",
    "EXIT": "its process ended with exit code 7",
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_case_that_kills_its_worker_twice_has_failed(tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(study, "remote", dying.dies)
    monkeypatch.setenv("ASFE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("ASFE_TEST_DEATH", how)
    records = records_of_dying(tmp_path)
    assert {n: r["status"] for n, r in records.items()} == {
        "c00": "failed",
        **dict.fromkeys(("c01", "c02", "c03"), "done"),
    }
    assert re.match(f"its worker died twice: {DEATHS[how]}", records["c00"]["message"])
    told = json.loads((tmp_path / "out" / RECORDS / "c00.json").read_text())
    assert told == records["c00"]
    assert "waiting for workers" not in "".join(capsys.readouterr()), "they come by themselves"


def test_a_case_that_takes_more_than_its_share_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEAST", 0.3)
    monkeypatch.setattr(study, "remote", dying.dies)
    monkeypatch.setenv("ASFE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("ASFE_TEST_DEATH", "MEMORY")
    message = records_of_dying(tmp_path, memory=0.5)["c00"]["message"]
    assert message.startswith("its worker died twice: it used more than 0.5 GB of memory; take")


def test_how_a_worker_of_a_cluster_died_is_not_made_up():
    class Client:
        def get_events(self, topic):
            return [(0.0, {"worker": "tcp://b:1", "pid": 9, "rss": 1})]

    def of(address: str, times: int = 1) -> str:
        last = SimpleNamespace(address=address, pid=9, memory_limit=4e9)
        return death_of(Client(), KilledWorker("c00", last, times))

    told = "its cluster does not tell how; see the log of the worker at tcp://a:1"
    assert of("tcp://a:1") == f"its worker died twice: {told}"
    assert of("tcp://a:1", 3) == f"its worker died 4 times: {told}"
    assert "it used more than 4.0 GB of memory" in of("tcp://b:1")


def test_a_cluster_without_workers_is_told_of(tmp_path):
    table, _ = write_study(tmp_path / "in", 4)
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        argv = [table, "--out", tmp_path / "out", "--scheduler", cluster.scheduler_address]
        process, log = start(*argv, log=tmp_path / "log"), tmp_path / "log"
        try:
            line = f"waiting for workers: start some by `dask worker {cluster.scheduler_address} "
            wait_for(lambda: line in log.read_text(), process)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_that_there_are_no_workers_is_said_again(monkeypatch):
    """Also after some had been there: once a minute, and at once when they are gone."""
    monkeypatch.setattr(study_workers, "LOOK", 0)
    clock, counts, lines = itertools.count(0, 10), iter([0] * 8 + [1] * 3 + [0] * 3), []

    class Left:
        def __init__(self, futures):
            self.ready = False

        def count(self):
            return 0 if self.ready else 1

        def has_ready(self):
            return self.ready

    left = Left(())

    def workers(client):
        count = next(counts, None)
        left.ready = count is None
        return count

    monkeypatch.setattr(study_workers, "as_completed", lambda futures: left)
    monkeypatch.setattr(study_workers, "workers_of", workers)
    monkeypatch.setattr(study_workers, "waiting_line", lambda client: "waiting")
    monkeypatch.setattr(study_workers.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(study_workers.time, "sleep", lambda seconds: None)
    assert list(study_workers.as_they_end(None, [], lines.append)) == []
    assert lines == ["waiting"] * 3


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, monkeypatch, in_process):
    table, _ = write_study(tmp_path / "in", 4)
    monkeypatch.setattr(study, "CONNECT", 1)
    argv = [str(table), "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:9"]
    code, _, err = in_process(study, lambda: parse_args(StudyArgs, argv))
    assert code == 2 and err.startswith("study.py: error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_cluster_that_goes_and_memory_for_nothing_are_one_line(monkeypatch):
    class Future:
        def result(self):
            raise CommClosedError("Stream is closed")

    with pytest.raises(UserError, match="the cluster is gone; start again to go on"):
        study.result_of(None, Future(), None)
    monkeypatch.setattr(limits, "free_bytes", lambda: 5e9)
    monkeypatch.setattr(limits, "granted_cores", lambda: 16)
    args, jobs = study.shares(StudyArgs())
    assert (jobs, args.threads, args.memory) == (2, 8, 2.5)
    with pytest.raises(
        UserError, match=r"--jobs is 4, but of the 5\.0 GB that are free each would have 1\.2"
    ):
        study.shares(StudyArgs(jobs=4))
    with pytest.raises(UserError, match=r"--memory is 0\.3, expected at least 2"):
        study.shares(StudyArgs(memory=0.3))
