"""Fuse many pairs with one command, on this machine or on a cluster, and report on all of them.

    python study.py pairs.csv --out fused/             a table: img1,img2 and settings of a case
    python study.py --bids bids/                       CT and PET with MRI of a BIDS folder
    python study.py --dir1 ct/ --dir2 mri/ --out fused/    two folders, paired by file name
    python study.py pairs.csv --out fused/ --scheduler tcp://10.0.0.1:8786    a Dask cluster

Each case runs as in test_asfe.py. A case that fails does not stop the others, and what is done is
not done again: stop it at any moment and start it again. report.html shows every case. Dask hands
the cases out and restarts what dies; see docs/study.md. Settings: args_setting.py.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from args_setting import StudyArgs, VolumeArgs
from cli import (
    Column,
    UserError,
    check_study,
    columns_of,
    command_line,
    pick_device,
    run_script,
    say,
    visible,
    without_effect,
)

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(StudyArgs, __doc__, check_study)

from tqdm import tqdm

import limits
from images import writable_folder, write_bytes
from studies.bids import description, ignored
from studies.cases import Case, Listing, find_cases, left_out
from studies.memory import USABLE, bytes_of_case
from studies.report import write_report
from studies.run import write_record
from weights import load_model

try:
    import dask
    from distributed import Client, Future, KilledWorker, LocalCluster
    from distributed.comm import CommClosedError

    from studies.workers import RememberingNanny, as_they_end, death_of
except ModuleNotFoundError as error:
    missing = error.name
else:
    missing = None

LEAST = 2  # GB of a process: PyTorch and two slices of 32 x 32 did not fit into 1
CONNECT = 20  # seconds that a cluster may take to answer
# Of Dask, for the processes of this machine. A case whose worker died is tried once more. A worker
# holds one case and nothing in store, so that no other case has part in a death. A worker never
# pauses: PyTorch keeps its memory between cases, and that would stop it for good.
CONFIG = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # Ctrl-C reaches every process of the terminal. Workers ignore it: the run itself ends them.
    "distributed.worker.preload": ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
}


def main(args: StudyArgs) -> None:
    if missing:
        raise UserError(f"study.py needs {missing}: pip install -r requirements-study.txt")
    check_study(args)
    asked = args
    args, jobs = shares(args)
    out, cases = cases_of(args)
    if jobs > 1 and not (asked.jobs or asked.memory):
        args, jobs, cases = with_room(args, jobs, cases, asked.threads)
    check_weights(args, cases)
    writable_folder(out)
    left = left_out(listing_of(args, out))
    for line in left:
        say(line)
    if args.bids:
        write_bytes(out / "dataset_description.json", description(args.bids, out).encode())
        write_bytes(out / ".bidsignore", ignored().encode())
    records: dict[str, dict] = {}
    with workers(args, jobs) as client:
        try:
            fuse_all(client, cases, records)
        except KeyboardInterrupt:
            print("stopped; start again to go on")
            raise
        finally:  # also of a run that is stopped
            page = write_report(out, cases, records, left)
            say(f"report: {page}")
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(cases)} cases failed, {page} names them")


SHARED = {f.name for f in fields(VolumeArgs)} | {"stretch"}  # count for all cases


def cases_of(args: StudyArgs) -> tuple[Path, list[Case]]:
    """The folder of everything that is written, and the cases that the settings ask for."""
    out = (args.out or args.bids / "derivatives" / "asfe-fusion").absolute()
    words = {name: getattr(args, name) for name in SHARED}
    columns = columns_of(StudyArgs, SHARED)
    columns |= dict.fromkeys(("img1", "img2"), Column(Path, None, None, None))
    columns["name"] = Column(str, None, None, None)
    no_effect = partial(without_effect, StudyArgs)
    return out, find_cases(listing_of(args, out), words, columns, no_effect)


def listing_of(args: StudyArgs, out: Path) -> Listing:
    """Where the pairs are."""
    return Listing(
        out,
        args.table,
        args.bids,
        args.dir1,
        args.dir2,
        skip_unmatched=args.skip_unmatched,
        participants=args.participant_label,
        sessions=args.session_label,
        inside=args.inside,
    )


def shares(args: StudyArgs) -> tuple[StudyArgs, int]:
    """The settings with the threads and GB of each process here, and how many processes."""
    if args.scheduler or args.scheduler_file:
        return args, 0
    cores, free = limits.granted_cores(), limits.free_bytes() / 1e9
    jobs = args.jobs or max(1, cores // 2)
    if 0 < (args.memory or 0) < LEAST:
        raise UserError(f"--memory is {args.memory:g}, expected at least {LEAST} (GB)")
    if not args.memory and free / jobs < LEAST:
        if args.jobs:
            raise UserError(
                f"--jobs is {jobs}, but of the {free:.1f} GB that are free each would have "
                f"{free / jobs:.1f}, expected at least {LEAST}: give fewer"
            )
        jobs = max(1, int(free // LEAST))
        print(f"{jobs} at a time, as {free:.1f} GB are free and each case needs {LEAST}")
    threads = args.threads or max(1, cores // jobs)
    memory = args.memory or free / jobs
    return StudyArgs(**{**vars(args), "threads": threads, "memory": memory}), jobs


def with_room(
    args: StudyArgs, jobs: int, cases: list[Case], threads: int
) -> tuple[StudyArgs, int, list[Case]]:
    """Settings, number of processes and cases, so that the largest case fits into a process.

    `threads` is what the user gave for each process, 0 for nothing.
    """
    need, name = max((bytes_of_case(case), case.name) for case in cases)
    total = args.memory * jobs
    fewer = max(1, min(jobs, int(total * 1e9 * USABLE // max(need, 1))))
    if fewer == jobs:
        return args, jobs, cases
    needs = f"{name} needs about {limits.amount(need)} and {total:.1f} GB are free"
    say(f"{fewer} at a time in place of {jobs}, as {needs}")
    threads = threads or max(1, limits.granted_cores() // fewer)
    cases = [replace(c, runtime=c.runtime._replace(threads=threads)) for c in cases]
    return replace(args, threads=threads, memory=total / fewer), fewer, cases


def check_weights(args: StudyArgs, cases: list[Case]) -> None:
    """UserError if a case asks for weights that are not there or cannot be read."""
    if not (args.scheduler or args.scheduler_file):
        pick_device(args.DEVICE)
    seen = set()
    for case in cases:
        key = case.trained, case.request.task
        if key not in seen:
            load_model(*key, "cpu")
        seen.add(key)


@contextmanager
def workers(args: StudyArgs, jobs: int) -> Iterator["Client"]:
    """A client of Dask: of the cluster that the settings name, or of `jobs` processes here."""
    with ExitStack() as stack:
        for name in ("distributed", "distributed.client", "tornado"):  # our words say enough
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if args.scheduler_file and not args.scheduler_file.is_file():
            raise UserError(f"--scheduler-file is {args.scheduler_file}: no such file")
        if args.scheduler or args.scheduler_file:
            where = {"address": args.scheduler, "scheduler_file": args.scheduler_file}
            where = {key: str(value) for key, value in where.items() if value}
            try:
                client = Client(**where, timeout=CONNECT)
            except (ValueError, TypeError) as error:
                raise UserError(f"--scheduler: {error}") from None
            print(f"cluster at {client.scheduler.address}")
        else:
            stack.enter_context(dask.config.set(CONFIG))
            cluster = LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                memory_limit=int(args.memory * 1e9),
                worker_class=RememberingNanny,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # Dask's, on a port that is free
                silence_logs=logging.CRITICAL,
            )
            client = Client(stack.enter_context(cluster))
            print(f"workers: {jobs}; of each: threads {args.threads}, GB at most {args.memory:.1f}")
        yield stack.enter_context(client)


def fuse_all(client: "Client", cases: list[Case], records: dict[str, dict]) -> None:
    """Have the workers fuse the cases, and put each record into `records` once it is there."""
    waiting = {}
    for case in cases:
        packed = case.packed()
        key = f"{case.name}-{sha256(packed).hexdigest()}"
        waiting[client.submit(remote, packed, key=key, pure=False)] = case
    with tqdm(total=len(cases), unit="case", desc="study") as progress:
        told = progress.write if client.cluster is None else lambda line: None  # else they come
        for future in as_they_end(client, list(waiting), told):
            case = waiting.pop(future)
            record = records[case.name] = result_of(client, future, case)
            if record["status"] == "failed":
                progress.write(visible(f"{case.name}: failed: {record['message']}"))
            slow = max(records.values(), key=lambda r: r["seconds"])
            progress.set_postfix_str(f"slowest {slow['name']}, {slow['seconds']:.0f} s")
            progress.update()
            future.release()
    again = sum(record["again"] for record in records.values())
    done = sum(record["status"] == "done" for record in records.values())
    print(f"{done} of {len(cases)} cases done, {again} of them before")
    slow = sorted(records.values(), key=lambda r: -r["seconds"])[:3]
    say("slowest: " + ", ".join(f"{r['name']} {r['seconds']:.1f} s" for r in slow))


def result_of(client: "Client", future: "Future", case: Case) -> dict:
    """The record of a case that has ended; a case whose worker died has failed."""
    try:
        return future.result()
    except KilledWorker as error:
        message = death_of(client, error)
    except (CancelledError, CommClosedError):
        raise UserError("the cluster is gone; start again to go on") from None
    except Exception as error:  # such as a worker that lacks a package
        message = " ".join(f"{type(error).__name__}: {error}".split())
    record = {"name": case.name, "status": "failed", "message": message, "again": False}
    record["seconds"] = 0.0
    write_record(case, record)  # its worker could not
    return record


def remote(packed: bytes) -> dict:
    """`run_case` of a packed case, imported where it runs: a scheduler needs nothing of ours."""
    from distributed import get_worker

    from studies.run import run_case

    return run_case(packed, get_worker().memory_manager.memory_limit or 0)


if __name__ == "__main__":
    run_script(main, ARGS)
