"""Everything that needs a GPU, in pieces: `benchmarks/gpu.sh [PIECE ...]`, else all that is left.

  golden               the golden vectors on the device
  attention            forms of SFEF's softmaxes (attention.py)
  step, forward        time and memory of training and inference (train_step.py, throughput.py)
  paper-TASK           the published size, our recipe: trained, test split fused, metrics
  published            the published size, recipe and arithmetic on CT-MRI, with --stretch
  compact-TASK         the compact size, and its shipped weights on the same validation patients

A piece is done once --work holds its JSON; a training that was stopped goes on. --out gets
results.json, logs.zip, zips of fused images and compact weights, each file under 16 MiB. Under
"unfinished" results.json has what a piece found that came to no end. On another machine,
--earlier results.json says what was done before. The checkpoint of the published size (weights,
their average and two moments, 2.7 GB) is written ten times in a training and removed at its end:
--work wants a fast disk, or one in memory. --dry-run runs every piece on a CPU with phantoms and
tiny settings, `compact` in place of `paper`; its figures mean nothing.
"""

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# the root first: metrics.py is there and here
sys.path[:1] = [str(ROOT), str(HERE)]

import training  # noqa: E402
from piece import FIGURES, Piece, StoppedError, end  # noqa: E402

from args_setting import OneLineParser, run_script  # noqa: E402

NEEDS = ("torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "tqdm", "scipy")
NEEDS += ("tensorboard", "matplotlib")  # training
LARGEST = 15 * 2**20  # bytes of a file in --out


# --- pieces that measure ---------------------------------------------------------------------


def golden(piece: Piece) -> dict:
    """The test of the golden vectors, on the device."""
    check_packages(("pytest",))
    folder = piece.args.golden
    if not (folder / "expected.npz").is_file():
        raise ValueError(f"{folder} has no expected.npz, expected the golden vectors: --golden")
    key = "golden_vectors and not cuda" if piece.args.dry_run else "golden_vectors_on_cuda"
    test = "tests/test_network.py"
    env = {"ASFE_SHARED": str(folder.parent)}
    piece.call("-m", "pytest", test, "-k", key, "-vv", "-p", "no:cacheprovider", env=env)
    text = (piece.args.work / "logs" / f"{piece.name}.log").read_text()
    if "passed" not in piece.last_line():
        raise ValueError(f"no golden vector was compared: {piece.last_line()}")
    lines = [line.split(" ")[0] for line in text.splitlines() if " PASSED" in line]
    return {"passed": lines, "relative_error_below": 1e-4}


def attention(piece: Piece) -> dict:
    tiny = ("--batch", 1, "--slots", 16, "--scales", "64x16", "32x24", "--repeats", 1)
    return piece.figures("attention.py", *((*tiny, "--no-compile") if piece.args.dry_run else ()))


def step(piece: Piece) -> dict:
    tiny = ("--sizes", "compact", "--batch", 1, "--side", 32, "--repeats", 1, "--matrix", 64)
    return piece.figures("train_step.py", *((*tiny, "--no-compile") if piece.args.dry_run else ()))


def forward(piece: Piece) -> dict:
    tiny = ("--sizes", "compact", "--side", 32, "--batches", 1, 2, "--repeats", 1, "--matrix", 64)
    tiny += ("--slices", 4, "--volume_side", 32, "--volume_batch", 2, "--largest", 64)
    return piece.figures("throughput.py", *(tiny if piece.args.dry_run else ()))


def pieces() -> dict[str, Callable[[Piece], dict]]:
    """The pieces by name, in the order in which they are best run."""
    every = {"golden": golden, "attention": attention, "step": step, "forward": forward}
    return every | {name: training.train_and_test for name in training.TRAININGS}


# --- the run ---------------------------------------------------------------------------------


def check_packages(names: tuple[str, ...] = NEEDS) -> None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(f"not installed: {', '.join(absent)}; see requirements-dev.txt")
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(f"PyTorch is {torch.__version__}, expected 2.6 or newer")


def done(args: argparse.Namespace) -> dict[str, dict]:
    """What the finished pieces found, by name."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((args.work / "pieces").glob("*.json"))
    }


def unfinished(args: argparse.Namespace) -> dict[str, dict]:
    """What benchmarks found whose pieces came to no end, by name."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(args.work.glob(f"*/{FIGURES}"))
        if not (args.work / "pieces" / f"{path.parent.name}.json").exists()
    }


def run_piece(name: str, function: Callable[[Piece], dict], args: argparse.Namespace) -> None:
    from timing import describe_device, write_json

    from network import pick_device

    piece = Piece(name, args)
    piece.folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: log in {args.work / 'logs' / name}.log", flush=True)
    found = function(piece)
    document = {
        "dry_run": args.dry_run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - piece.started, 1),
        "about": describe_device(pick_device(args.DEVICE)),
        "commands": piece.commands,
        "together_with": args.beside,
        "figures": found,
    }
    write_json(args.work / "pieces" / f"{name}.json", document)
    print(f"{name}: done in {document['seconds']} s", flush=True)


def run_one_by_one(
    every: dict[str, Callable[[Piece], dict]], args: argparse.Namespace
) -> list[str]:
    """Run the pieces, and copy the results after each, as the next may be killed; the failed."""
    failed = []
    for name, function in every.items():
        try:
            run_piece(name, function, args)
        except (ValueError, OSError, StoppedError) as error:
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            failed.append(name)
        finally:
            if args.bundle:
                bundle(args)
    return failed


def run_together(names: list[str], args: argparse.Namespace, argv: list[str]) -> list[str]:
    """Run the pieces in processes of their own at the same time; those that failed."""
    flags = [word for word in argv if word not in args.pieces and word != "--together"]
    children = {}
    for name in names:
        beside = ",".join(other for other in names if other != name)
        command = [sys.executable, "-u", str(HERE / "gpu.py"), name, *flags]
        command += ["--no-bundle", "--beside", beside]
        children[name] = subprocess.Popen(command)
    try:
        return [name for name, child in children.items() if child.wait()]
    finally:
        for child in children.values():
            end(child)


def bundle(args: argparse.Namespace) -> None:
    """Copy what is worth keeping into --out: results.json, logs, fused images, compact weights."""
    from timing import write_json

    args.out.mkdir(parents=True, exist_ok=True)
    document = {"dry_run": args.dry_run, "pieces": done(args), "unfinished": unfinished(args)}
    write_json(args.out / "results.json", document)
    fused = sorted(args.work.glob("*/fused/**/*.png"))
    write_zips(args.out, "fused", fused, args.work)
    logs = [*args.work.glob("logs/*.log"), *args.work.glob("*/*.csv"), *args.work.glob("*/*.png")]
    write_zips(args.out, "logs", sorted(logs), args.work)
    for path in args.work.glob("compact-*/*.safetensors"):
        if path.stat().st_size <= LARGEST and "_stopped" not in path.name:
            shutil.copy(path, args.out / path.name)


def write_zips(out: Path, name: str, files: list[Path], root: Path, largest: int = LARGEST) -> None:
    """NAME.zip, or NAME-1.zip, NAME-2.zip …: the files in groups of at most `largest` bytes."""
    groups: list[list[Path]] = [[]]
    size = 0
    for path in files:
        size += path.stat().st_size
        if size > largest and groups[-1]:
            groups.append([])
            size = path.stat().st_size
        groups[-1].append(path)
    for old in [*out.glob(f"{name}.zip"), *out.glob(f"{name}-*.zip")]:
        old.unlink()
    for i, group in enumerate(groups, 1):
        if group:
            path = out / (f"{name}.zip" if len(groups) == 1 else f"{name}-{i}.zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in group:
                    archive.write(file, file.relative_to(root))


def take_up(args: argparse.Namespace) -> None:
    """Count the pieces of an earlier results.json as done."""
    from timing import write_json

    try:
        found = json.loads(args.earlier.read_text())["pieces"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{args.earlier}: not a results.json of this script") from None
    for name, document in found.items():
        path = args.work / "pieces" / f"{name}.json"
        if not path.exists() and document["dry_run"] == args.dry_run:
            write_json(path, document)


def exit_on_sigterm() -> None:
    """End by an exception, so that scripts under way end as well: they would go on with our files.

    Only once all packages are loaded: an exception amid an import may be taken for a failed one.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main(args: argparse.Namespace, argv: list[str] | None = None) -> None:
    check_packages()
    from network import pick_device

    pick_device(args.DEVICE)
    for folder in ("pieces", "logs"):
        (args.work / folder).mkdir(parents=True, exist_ok=True)
    if args.earlier:
        take_up(args)
    every = pieces()
    if unknown := set(args.pieces) - every.keys():
        raise ValueError(f"no piece {sorted(unknown)}, expected some of {', '.join(every)}")
    if args.dry_run and not args.data_dir.is_dir():
        training.draw_data(args.data_dir)
    finished = done(args)
    left = [name for name in args.pieces or every if name not in finished]
    print(f"done: {', '.join(finished) or 'nothing'}; to do: {', '.join(left) or 'nothing'}")
    exit_on_sigterm()
    together = [name for name in left if args.together and name in training.TRAININGS]
    failed = run_one_by_one({name: every[name] for name in left if name not in together}, args)
    try:
        if together:  # after what measures times
            failed += run_together(together, args, sys.argv[1:] if argv is None else argv)
    finally:
        if args.bundle:
            bundle(args)
    if failed:
        raise ValueError(f"not done: {', '.join(failed)}; the same command goes on")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE")
    parser.add_argument("--out", type=Path, default=ROOT / "result" / "gpu")
    parser.add_argument("--work", type=Path, help="checkpoints, logs; a fast disk or memory")
    parser.add_argument("--data_dir", type=Path, help="the HMIF set; default HMIFDatasets")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden")
    published = ROOT.parent / "shared" / "published"
    parser.add_argument("--published", type=Path, default=published, help="METHOD/TASK/NAME.png")
    parser.add_argument("--DEVICE", default=None, help="default cuda, cpu with --dry-run")
    parser.add_argument("--minutes", type=float, default=6, help="for each training")
    parser.add_argument("--limit", type=float, default=570, help="seconds for each piece")
    parser.add_argument("--train_args", default="", help="more for train_asfe.py, in one string")
    parser.add_argument("--together", action="store_true", help="trainings at the same time")
    parser.add_argument("--earlier", type=Path, help="results.json of another machine")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--bundle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--beside", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    kind = "asfe-dry" if args.dry_run else "asfe-gpu"
    args.work = (args.work or Path(tempfile.gettempdir()) / kind).resolve()
    args.out = args.out.resolve()
    args.DEVICE = args.DEVICE or ("cpu" if args.dry_run else "cuda")
    default = args.work / "data" if args.dry_run else ROOT / "HMIFDatasets"
    args.data_dir = (args.data_dir or default).resolve()
    args.golden, args.published = args.golden.resolve(), args.published.resolve()
    if args.dry_run:
        args.minutes = min(args.minutes, 0.05)
    return args


if __name__ == "__main__":
    run_script(main, parse())
