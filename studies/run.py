"""One case in a worker: fused unless it is done already, and written down either way.

A case is done if its record is there, was made of the same settings, inputs and weights, and the
files it names are as they were written. The record is removed before a case runs and written after
all else, so that a run killed in between starts that case again.
"""

import hashlib
import io
import json
import os
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from functools import cache
from glob import escape
from pathlib import Path

import test_asfe
from args_setting import TestArgs, WeightsArgs
from cli import UserError, setup_runtime
from images import write_bytes
from inference import optimise
from network import ASFEFusion
from studies.cases import ELSEWHERE, Case, planned
from weights import load_model, shipped_path

ONE = threading.Lock()  # a worker with several threads still fuses one case at a time


def run_case(packed: str) -> dict:
    """Fuse one case, see `Case.packed`; returns its record.

    A record has the keys name, status ("done", "failed"), message (one line), seconds, again
    (whether it was done before), fingerprint, and outputs: {path relative to the record: SHA-256}.
    """
    with ONE:
        case = Case.unpacked(packed)
        started = time.perf_counter()
        record = {"name": case.name, "status": "done", "message": "", "again": False}
        try:
            print_of = fingerprint(case.settings)
            before = read_record(case.record)
            if is_done(case, before, print_of):
                return before | {"again": True}
            case.record.unlink(missing_ok=True)
            fuse(case.settings)
            record |= {"fingerprint": print_of, "outputs": output_hashes(case)}
        except (UserError, OSError) as error:
            record |= {"status": "failed", "message": " ".join(str(error).split())}
        except Exception as error:  # ours, but the other cases go on
            message = " ".join(f"{type(error).__name__}: {error}".split())
            record |= {"status": "failed", "message": message, "traceback": traceback.format_exc()}
        record["seconds"] = round(time.perf_counter() - started, 3)
        case.record.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(case.record, (json.dumps(record, indent=1) + "\n").encode())
        return record


def fuse(settings: TestArgs) -> None:
    """What `python test_asfe.py` does with these settings, but without a word."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        device = setup_runtime(settings)
        key = {f.name: getattr(settings, f.name) for f in fields(WeightsArgs)}
        test_asfe.main(settings, network(device, WeightsArgs(**key)))


@cache
def network(device, args: WeightsArgs) -> ASFEFusion:
    """The network that the settings name, loaded once in a process."""
    return optimise(load_model(args, args.task, device))


# --- what is done ----------------------------------------------------------------------------


def is_done(case: Case, record: dict, print_of: str) -> bool:
    """Whether a record is of this fingerprint and its files are as they were written."""
    if record.get("status") != "done" or record.get("fingerprint") != print_of:
        return False
    folder = case.record.parent
    return all(
        (folder / name).is_file() and file_hash(folder / name) == value
        for name, value in record["outputs"].items()
    )


def read_record(path: Path) -> dict:
    """The record of a case, or {} if there is none that can be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def fingerprint(settings: TestArgs) -> str:
    """SHA-256 of what a case's outputs depend on: its settings, and the content of its files."""
    content = {}
    for f in fields(TestArgs):
        value = getattr(settings, f.name)
        if f.name == "weights":
            value = value or shipped_path(settings.size, settings.task)
            content[f.name] = weights_hash(value, value.stat().st_mtime_ns)
        elif f.name not in ELSEWHERE | {"out"}:
            named = isinstance(value, Path) or (f.name == "register" and Path(value).is_file())
            content[f.name] = tree_hash(Path(value)) if named else repr(value)
    content["png"] = settings.png is not None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def output_hashes(case: Case) -> dict[str, str]:
    """The files that a case has written and their SHA-256, by path relative to its record."""
    files = []
    for path in planned(case.settings):
        files += sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    folder = case.record.parent
    return {Path(os.path.relpath(path, folder)).as_posix(): file_hash(path) for path in files}


@cache
def weights_hash(path: Path, time_ns: int) -> str:
    """`file_hash` of weights, once in a process for each version of the file."""
    return file_hash(path)


def tree_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files.

    A header whose voxels are in a file of their own counts with all files of its name.
    """
    if path.is_dir():
        folder, files = path, path.rglob("*")
    elif path.suffix.lower() in (".mhd", ".nhdr"):
        folder, files = path.parent, path.parent.glob(f"{escape(path.stem)}.*")
    else:
        return file_hash(path)
    files = sorted(file for file in files if file.is_file())
    parts = [f"{file.relative_to(folder).as_posix()} {file_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
