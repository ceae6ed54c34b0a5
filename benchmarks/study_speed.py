"""Throughput of study.py with one worker and with two, and what it costs over a plain loop.

    python benchmarks/study_speed.py                          (about ten minutes)
    python benchmarks/study_speed.py --cases 4 --slices 16 --repeats 1

A plain loop in one process, one worker and two workers take turns on the same phantom volumes, each
process with one thread. Seconds, and CPU seconds of all processes together, run
from the first case to the last, without the start of the processes and the loading of the network:
a case that is not counted goes before, one per worker. Only the ratios of one run mean anything. On
a machine that does other work a second worker also takes time from the others, and only the CPU
seconds tell what is ours. The file is not called study.py, which `import study` would find in place
of the command.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from machine import machine, make_parser, positive
from study_files import draw_pair, write_table, write_volume

import study
from args_setting import StudyArgs
from cli import run_script
from studies.cases import Case
from studies.run import run_case
from volumes.requests import Writing


def draw(folder: Path, count: int, slices: int, side: int) -> Path:
    """A table of `count` pairs of phantom volumes, (side, side, slices) each."""
    rows = []
    for i in range(count):
        for kind, data in zip(("ct", "mri"), draw_pair(i, slices, side), strict=True):
            write_volume(folder / f"{kind}{i}.nii.gz", data)
        files = {"img1": f"ct{i}.nii.gz", "img2": f"mri{i}.nii.gz"}
        rows.append({**files, "name": f"c{i}", "register": "off"})
    return write_table(folder / "pairs.csv", rows)


def spare(case: Case, i: int) -> Case:
    """A case that is not counted: the same, written elsewhere."""
    out = case.request.writing.out.with_name(f"spare{i}.nii.gz")
    request = replace(case.request, writing=Writing(out))
    record = case.record.with_name(f"spare{i}.json")
    return replace(case, name=f"spare{i}", request=request, record=record)


def now() -> np.ndarray:
    """Seconds of the clock, and CPU seconds of this process and its children so far."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return np.array([time.perf_counter(), sum(t.user + t.system for t in times)])


def seconds_of(table: Path, jobs: int) -> np.ndarray:
    """What the cases take on `jobs` workers, or in a plain loop for 0: see `now`."""
    with tempfile.TemporaryDirectory() as out:
        args = StudyArgs(table=table, out=Path(out), jobs=jobs or 1, threads=1, DEVICE="cpu")
        args, _ = study.shares(args)
        _, cases = study.cases_of(args)
        spares = [spare(cases[0], i) for i in range(jobs or 1)]
        records: dict[str, dict] = {}
        if not jobs:
            run_case(spares[0].packed())
            started = now()
            records = {case.name: run_case(case.packed()) for case in cases}
            taken = now() - started
        else:
            with study.workers(args, jobs) as client:
                study.fuse_all(client, spares, {})
                started = now()
                study.fuse_all(client, cases, records)
                taken = now() - started
        assert all(record["status"] == "done" for record in records.values()), records
        return taken


def main(args: argparse.Namespace) -> None:
    print(machine("torch", "distributed"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        table = draw(Path(folder), args.cases, args.slices, args.side)
        taken: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
        for _ in range(args.repeats):
            for jobs, found in taken.items():
                found.append(seconds_of(table, jobs))
                name = f"{jobs} workers" if jobs else "plain loop"
                print(f"{name}: {found[-1][0]:.1f} s, CPU {found[-1][1]:.1f} s", flush=True)
    loop, one, two = (np.array(found) for found in taken.values())  # (repeats, 2)
    faster = np.median(one[:, 0] / two[:, 0])
    clock, cpu = np.median(one / loop, 0) - 1
    print(f"two workers: {faster:.2f} times the throughput of one")
    print(f"one worker over a plain loop: {clock:+.1%} by the clock, {cpu:+.1%} CPU")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cases", type=positive, default=20)
    parser.add_argument("--slices", type=positive, default=64)
    parser.add_argument("--side", type=positive, default=64, help="of a slice, in pixels")
    parser.add_argument("--repeats", type=positive, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
