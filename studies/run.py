"""One case in a worker: fused unless it is done already, and written down either way.

A case is done if two things hold. Its record is of the same request, inputs and weights. And the
files that the record names are as they were: those that were opened, and those that were written.
The record is removed before a case runs, and written after all else. So if a run is killed in
between, that case starts again.
"""

import hashlib
import json
import os
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import limits
from args_setting import VERSION
from cli import UserError, file_hash, setup_runtime
from fusing import SOFTWARE, FusedImage, ImageRequest, fuse_images
from images import write_bytes
from inference import optimise
from network import ASFEFusion
from studies.cases import Case
from studies.memory import USABLE
from weights import Trained, load_model, weights_path

ONE = threading.Lock()  # a worker with several threads still fuses one case at a time
NETWORKS: dict[tuple, ASFEFusion] = {}  # by content and device, the latest last
KEPT = 2  # of them at a time: the paper size has 0.7 GB


def run_case(packed: bytes, memory: int = 0) -> dict:
    """Fuse one case, see `Case.packed`; returns its record.

    `memory` is how many bytes the worker may use until it is ended; 0 for all that is free.

    A record has the keys name, status ("done", "failed"), message (one line), seconds, again
    (whether it was done before), and of a case that is done also software, version and
    weights_sha256, fingerprint, found (see `found_by`), and inputs and outputs: {path: SHA-256},
    of outputs relative to the record.
    """
    with ONE:
        case = Case.unpacked(packed)
        started = time.perf_counter()
        limits.Share.most = int(memory * USABLE)
        record = {"name": case.name, "status": "done", "message": "", "again": False}
        try:
            digest = file_hash(weights_path(case.trained, case.request.task))
            print_of = fingerprint(case, digest)
            before = read_record(case.record)
            if is_done(case, before, print_of):
                return before | {"again": True}
            case.record.unlink(missing_ok=True)
            record |= {"software": SOFTWARE, "version": VERSION, "weights_sha256": digest}
            record |= {"fingerprint": print_of} | fuse(case, digest)
        except (UserError, OSError) as error:
            record |= {"status": "failed", "message": " ".join(str(error).split())}
        except Exception as error:  # ours, but the other cases go on
            message = " ".join(f"{type(error).__name__}: {error}".split())
            record |= {"status": "failed", "message": message, "traceback": traceback.format_exc()}
        record["seconds"] = round(time.perf_counter() - started, 3)
        write_record(case, record)
        return record


def fuse(case: Case, digest: str) -> dict:
    """Fuse a case with weights of this SHA-256; returns what its record says of the result."""
    model = network(case.trained, case.request.task, setup_runtime(case.runtime), digest)
    if isinstance(case.request, ImageRequest):
        [result] = fuse_images([case.request], model)
        written = result.files.values()
    else:
        from volumes import fuse_volumes, use_threads  # their packages are an extra

        use_threads(case.runtime.threads)
        result = fuse_volumes(case.request, model)
        written = [path for paths in result.files.values() for path in paths]
    named = set(case.request.sources)  # whose content is in the fingerprint
    opened = [path for path in result.read if not named & {path, *path.parents}]
    return {
        "found": found_by(result),
        "inputs": {str(path): file_hash(path) for path in opened},
        "outputs": hashes(written, case.record.parent),
    }


def found_by(result: Any) -> dict:
    """What the report shows of a result; None where it does not apply.

    The keys are apart_mm (of volumes: how far apart the sources were, the mean over the head),
    apart_pixels (of images: the mean over the image), applied (False: it was only measured, nothing
    moved), coverage (of volumes: 0 to 1, the least share of the result's field that a source
    covers), doubts and notes (lines; notes are on what was done in another way for lack of memory).
    """
    if isinstance(result, FusedImage):
        shift = result.shift
        odd = [line for lines in result.odd.values() for line in lines]
        return {
            "apart_mm": None,
            "apart_pixels": shift and shift.moved_pixels,
            "applied": bool(shift and shift.applied),
            "coverage": None,
            "doubts": [*(shift.doubts if shift else ()), *odd],
            "notes": list(result.notes),
        }
    return {
        "apart_mm": result.apart_mm,
        "applied": result.registered.applied,
        "apart_pixels": None,
        "coverage": min(result.coverage),
        "doubts": list(result.doubts),
        "notes": list(result.notes),
    }


def network(which: Trained, task: str, device: torch.device, digest: str) -> ASFEFusion:
    """A network whose file has this SHA-256, loaded once in a process.

    Raises UserError if the file is another one meanwhile.
    """
    key = digest, which.size, which.aff, str(device)
    if key in NETWORKS:
        return NETWORKS[key]
    path = weights_path(which, task)
    model = optimise(load_model(which._replace(weights=path), task, device, lambda line: None))
    if file_hash(path) != digest:
        raise UserError(f"{path} was changed while it was read; start again")
    while len(NETWORKS) >= KEPT:
        del NETWORKS[next(iter(NETWORKS))]
    NETWORKS[key] = model
    return model


# --- what is done ----------------------------------------------------------------------------


def is_done(case: Case, record: dict, print_of: str) -> bool:
    """Whether a record is of this fingerprint, and its files are as they were read and written."""
    if record.get("status") != "done" or record.get("fingerprint") != print_of:
        return False
    files = {Path(name): value for name, value in record["inputs"].items()}
    files |= {case.record.parent / name: value for name, value in record["outputs"].items()}
    return all(path.is_file() and file_hash(path) == value for path, value in files.items())


def write_record(case: Case, record: dict) -> None:
    """Write down what became of a case."""
    case.record.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(case.record, (json.dumps(record, indent=1) + "\n").encode())


def read_record(path: Path) -> dict:
    """The record of a case, or {} if there is none that can be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def fingerprint(case: Case, digest: str) -> str:
    """SHA-256 of what a case's outputs depend on.

    That is the request, with the content of its files in place of their paths; the paths of the
    outputs, as seen from the record; and the weights, of which `digest` is the SHA-256.
    """
    folder = case.record.parent
    content = {
        "request": without_paths(asdict(case.request)),
        "sources": [tree_hash(path) for path in case.request.sources],
        "outputs": [relative(output.path, folder) for output in case.request.plan().outputs],
        "weights": [digest, case.trained.size, case.trained.aff],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def without_paths(value: Any) -> Any:
    """A request's fields for JSON, each path as its kind only."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [without_paths(part) for part in value]
    return "a path" if isinstance(value, Path) else value


def hashes(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Files and their SHA-256, by path relative to a folder."""
    return {relative(path, folder): file_hash(path) for path in files}


def relative(path: Path, folder: Path) -> str:
    """A path as it is seen from a folder."""
    return Path(os.path.relpath(path, folder)).as_posix()


def tree_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(path).as_posix()} {file_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
