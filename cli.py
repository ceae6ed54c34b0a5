"""What every command shares: its flags, its one-line errors, and the set-up of the process.

The flags of a command are the fields of its dataclass in args_setting.py. What the user can mend is
a `UserError` or an `OSError` and ends in one line and exit code 2; any other error is a bug of ours
and keeps its traceback.
"""

import argparse
import codecs
import ctypes
import difflib
import gc
import hashlib
import io
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import types
import typing
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from args_setting import (
    ALL_TASKS,
    EXTENSIONS,
    VERSION,
    ClassifyArgs,
    MetricArgs,
    StudyArgs,
    TestArgs,
    TrainArgs,
    shipped_path,
)

if TYPE_CHECKING:  # it takes seconds to load, and flags need none of it
    import torch


INPUTS = {  # the settings that name what a command reads
    "folder": ("dir1", "dir2", "bids", "weights_dir"),
    "file": ("weights", "init", "table", "labels", "scheduler_file"),
    "file or folder": ("img1", "img2", "via"),
}


class UserError(ValueError):
    """What the user can mend; the message says what came, what was expected, and the next step."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line with exit code 2, and no flag is guessed."""

    def error(self, message: str):
        """Print what is wrong in one line and exit with 2."""
        if message.startswith("unrecognized arguments: --"):
            message = self.suggest(message.split()[2].partition("=")[0])
        self.exit(2, f"{self.prog}: error: {visible(message)}\n")

    def suggest(self, flag: str) -> str:
        """The message for an unknown flag: it names the flags that begin like it or are similar."""
        name = flag[2:].replace("-", "_")
        names = [action.dest for action in self._actions if action.option_strings]
        similar = [n for n in names if n.startswith(name)]
        similar = similar or difflib.get_close_matches(name, names, 1)
        ask = f"is {' or '.join(f'--{n}' for n in similar)} meant?" if similar else "see --help"
        return f"there is no flag {flag}, {ask}"


def make_parser(cls: type, description: str = "") -> argparse.ArgumentParser:
    """The command line of a settings dataclass: one flag for each field, named like the field."""
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="say the version, and which weights would be loaded"
    )
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        extras = dict(f.metadata)
        source, text = extras.pop("source"), extras.pop("help")
        extras.pop("minimum", None)
        shown = f.default.name if isinstance(f.default, Path) else f.default
        origin = "" if source == "ours" else f"; {source}"
        use = use_of(cls, f.name)
        where = f"for {use}; " if use else ""
        extras["help"] = f"{text} ({where}default {shown}{origin})".replace("%", "%%")
        if hints[f.name] is bool:
            extras["action"] = argparse.BooleanOptionalAction
        else:
            extras["type"] = plain_type(hints[f.name])
        spelled = f.name, f.name.replace("_", "-"), f.name.lower()
        spellings = dict.fromkeys(f"--{name}" for name in spelled)
        extras["dest"] = f.name
        if extras.pop("positional", False):
            spellings, extras["nargs"] = (f.name,), "?"
            del extras["dest"]
        parser.add_argument(*spellings, default=f.default, **extras)
    return parser


def plain_type(hint):
    """The type that argparse can call: Path for `Path | None`, int for `tuple[int, ...]`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def parse_args(cls: type, argv: list[str] | None = None, description: str = ""):
    """Parse `argv` (default: the command line) into an instance of `cls`; errors exit with 2."""
    print_anywhere()
    parser = make_parser(cls, description)
    given = vars(parser.parse_args(argv))
    if given.pop("version"):
        say(*version_lines(given))
        parser.exit(0)
    args = cls(**given)
    for f in fields(cls):  # argparse does not check a default that was edited in args_setting.py
        value, choices = getattr(args, f.name), f.metadata.get("choices")
        each = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if any(isinstance(v, float) and not math.isfinite(v) for v in each):
            parser.error(f"{f.name} is {value}, expected a finite number")
        if choices and not set(each) <= set(choices):
            parser.error(f"{f.name} is {value!r}, expected one of {', '.join(choices)}")
        if "minimum" in f.metadata and not value >= f.metadata["minimum"]:
            parser.error(f"{f.name} is {value}, expected at least {f.metadata['minimum']}")
    return args


def version_lines(settings: Mapping[str, Any]) -> list[str]:
    """The version of the software, and the SHA-256 of each file of weights that settings name."""
    paths = []
    if folder := settings.get("weights_dir"):
        paths = sorted(folder.glob("*.safetensors"))
    elif "weights" in settings and "size" in settings:
        size, task = settings["size"], settings.get("task", "all")
        paths = [settings["weights"] or shipped_path(size, task)]
    lines = [f"ASFE-Fusion {VERSION}"]
    for path in paths:
        told = f"SHA-256 {file_hash(path)}" if path.is_file() else "not there"
        lines.append(f"weights {path.name}: {told}")
    return lines


def command_line(cls: type, description: str, check: Callable | None = None):
    """`parse_args` of a command. Call it before the imports that take seconds.

    So --help, wrong flags and missing paths are answered at once. `check(args)` may raise UserError
    for flags that do not go together.

    Python's garbage collector is off until `run_script`. Imports leave no garbage, and collecting
    takes a tenth of the start.
    """
    args = parse_args(cls, None, description)
    run_script(check_inputs, args)
    if check:
        run_script(check, args)
    gc.disable()
    return args


def either(*names: str) -> Callable:
    """A check for `command_line`: UserError if none of these settings is given."""

    def check(args) -> None:
        if not any(getattr(args, name) for name in names):
            raise UserError("give " + " or ".join(f"--{name}" for name in names))

    return check


def check_inputs(args) -> None:
    """UserError if one of two sources is given alone, or a path to read from is not there."""
    given = {name: path for name, path in vars(args).items() if isinstance(path, Path)}
    for one, other in ("img1", "img2"), ("dir1", "dir2"):
        if (one in given) != (other in given):
            raise UserError(f"--{one} and --{other} come together, only one was given")
    for kind, names in INPUTS.items():
        for path in (given[name] for name in names if name in given):
            if not (path.is_dir() if kind == "folder" else path.exists()):
                raise UserError(f"{path}: no such {kind}")


# Unicode's categories of control and format characters, surrogates, separators of lines, and codes
# without a character.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
ASCII = str.maketrans({"↑": "^", "↓": "v", "→": ">", "×": "x", "–": "-", "…": "..."})


def print_anywhere() -> None:
    """Let a terminal without a character print another one; with code page 1252 it lacks ↑."""
    codecs.register_error("asfe", in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="asfe")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler for `codecs`: another character where there is one, else its code."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def visible(text: object) -> str:
    """Text on one line, in which what a terminal would obey or hide is shown as its code.

    Names and headers of files may hold control characters: they could move the cursor, colour the
    text, turn its direction, or look like a line of ours.
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c
        for c in str(text)
    )


@contextmanager
def installed(need: str, extra: str = "volumes") -> Iterator[None]:
    """For imports of an extra: a package that is not installed becomes a UserError.

    Args:
        need: how the line begins, such as "volumes need".
        extra: which requirements-EXTRA.txt has the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        line = f"{need} {error.name}: pip install -r requirements-{extra}.txt"
        raise UserError(line) from None


def say(*lines: object) -> None:
    """Print lines that may have text from a file in them, see `visible`."""
    print(*map(visible, lines), sep="\n")


def run_script(main: Callable, args) -> None:
    """Run a command's `main(args)`; what the user can mend ends in one line and exit code 2."""
    if not gc.isenabled():  # see `command_line`
        gc.freeze()  # modules stay until the end, so the collector need not look at them
        gc.enable()
    try:
        main(args)
    except (UserError, OSError) as error:
        message = visible(" ".join(str(error).split()))
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Runtime(NamedTuple):
    """Where networks run; the settings of a command have the same two fields."""

    DEVICE: str = "auto"
    threads: int = 0  # 0: as many as PyTorch takes by itself


def setup_runtime(runtime) -> "torch.device":
    """Set up the process before any work; returns the device of `runtime.DEVICE`.

    It sets how memory is kept, how subnormal numbers are treated, and `runtime.threads`. It takes a
    `Runtime`, or the settings of a command.
    """
    import torch  # not on top: see there

    keep_freed_memory()
    # Subnormal numbers slow a CPU down and carry no information: they become 0.
    # A thread takes this setting from the thread that starts it. So set it before any other starts.
    torch.set_flush_denormal(True)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    return pick_device(runtime.DEVICE)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for reuse; nothing happens with another C library.

    A pass on a CPU needs maps of tens of MB. If each pass got them from the system anew, page by
    page, that would take a tenth of its time. In a thread other than the first, as on the page, it
    would take a third: glibc always returns the memory of such a thread. So all threads share the
    memory of the first. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger pieces come directly from the system
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes at the end that are kept
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one pool of memory for all threads


def return_freed_memory() -> None:
    """Give memory that glibc keeps for reuse back to the system, so that it counts as free there.

    See malloc_trim(3).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pick_device(name: str) -> "torch.device":
    """The device that `--DEVICE` names; "auto" is CUDA, then MPS, then CPU.

    Raises UserError if the device is unknown or absent.
    """
    import torch  # not on top: see there

    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((d for d in ("cuda", "mps") if not absent[d]), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # is refused below
    if device.type not in ("cpu", *absent):
        raise UserError(f"DEVICE is {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if absent.get(device.type) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise UserError(f"DEVICE is {name!r}, but this machine has no such device; try auto")
    return device


# --- a temporary folder ----------------------------------------------------------------------


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that is removed when the program ends.

    First it removes the folders that killed programs have left.
    """
    remove_left(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        held = lock(Path(folder))
        try:
            yield Path(folder)
        finally:
            if held is not None:
                os.close(held)


def remove_left(prefix: str, age: float = 10) -> None:
    """Remove the temporary folders of programs that no longer run.

    A folder younger than `age` seconds stays: its program may have just started, and hold it soon.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # somebody else removes it, or it is another user's
            old = time.time() - folder.lstat().st_ctime > age
            if old and not folder.is_symlink() and (held := lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def lock(folder: Path) -> int | None:
    """Lock a folder until this program ends, also if it is killed.

    Returns the descriptor of the lock; None if another program has it, or on Windows.
    """
    try:
        import fcntl  # not on Windows

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


# --- where a setting counts ------------------------------------------------------------------

SPLIT, FOLDERS, ONE_PAIR = "the test split", "two folders", "one pair of images"
VOLUME_PAIR, DEMO = "volumes", "the demo"
MODES = (SPLIT, FOLDERS, ONE_PAIR, VOLUME_PAIR, DEMO)  # what test_asfe.py fuses
IMAGES = (SPLIT, FOLDERS, ONE_PAIR)


class Use(NamedTuple):
    """Where some settings have an effect. A setting that no row names always has one."""

    names: str  # of settings, with spaces between
    modes: tuple[str, ...]
    tasks: tuple[str, ...] = ALL_TASKS
    beside: str = ""  # a setting that must be given, too
    without: str = ""  # a setting that takes the place of these


USES = {
    TestArgs: (
        Use("task", (*IMAGES, VOLUME_PAIR)),
        Use("data_dir", (SPLIT,)),
        Use("cases", (SPLIT,)),
        Use("case_pattern", (SPLIT,), beside="cases"),
        Use("skip_unmatched contact_rows", (SPLIT, FOLDERS)),
        Use("batch_size", (SPLIT, FOLDERS, VOLUME_PAIR)),
        Use("levels page", IMAGES),
        Use("stretch metrics", (*IMAGES, DEMO)),
        Use("register", (ONE_PAIR, VOLUME_PAIR)),
        Use("force", (VOLUME_PAIR,)),
        Use("force", (ONE_PAIR,), beside="register"),
        Use("series1 series2 where frame affine axis tile", (VOLUME_PAIR,)),
        Use("png mosaic dicom moved transform labels nan_to_zero grid", (VOLUME_PAIR,)),
        Use("labels_of", (VOLUME_PAIR,), beside="labels"),
        Use("keep_patient", (VOLUME_PAIR,), beside="dicom"),
        Use("overlap", (VOLUME_PAIR,), beside="tile"),
        Use("window", (VOLUME_PAIR,), tasks=("CT-MRI",)),
        Use("suv", (VOLUME_PAIR,), tasks=("PET-MRI",)),
        Use("colour rgb via", (VOLUME_PAIR,), tasks=("PET-MRI", "SPECT-MRI")),
    ),
    MetricArgs: (
        Use("fused between jobs json markdown latex", ("--fused", "--one_source")),
        Use("metrics rank", ("--fused",)),
        Use("maps per_person", ("--one_source",)),
        Use("method weights size", ("--findings",)),
        Use("seed", ("--one_source", "--findings")),
        Use("seed", ("--fused",), beside="between"),
        Use("task", ("--findings",)),
        Use("task", ("--fused", "--one_source"), without="dir1"),
        Use("split cases data_dir", ("--fused", "--one_source", "--findings"), without="dir1"),
    ),
    ClassifyArgs: (
        Use("dir1 dir2 fused", ("--labels",)),
        Use("features", ("--labels", "--exploratory")),
        Use("folds", ("--labels", "--leakage")),
        Use("data_dir", ("--exploratory", "--leakage")),
        Use("plot", ("--leakage",)),
    ),
    TrainArgs: (
        Use("val", ("training",), without="val_cases"),
        Use("epoch patch_size batch_size", ("training",), without="stages"),
        Use("overwrite", ("training",), without="resume"),
    ),
}
CASES = (ONE_PAIR, VOLUME_PAIR)  # a case of a study is one of these
USES[StudyArgs] = tuple(
    use._replace(modes=tuple(mode for mode in use.modes if mode in CASES))
    for use in USES[TestArgs]
    if set(CASES) & set(use.modes)
)


def changed(args) -> set[str]:
    """The names of the settings that differ from their defaults."""
    return {f.name for f in fields(args) if getattr(args, f.name) not in (f.default, [])}


def without_effect(cls: type, mode: str, task: str, given: Iterable[str]) -> dict[str, str]:
    """The given settings that have no effect, by name in order, each with the reason."""
    given = set(given)
    reason_of = {}
    for name in sorted(given):
        rows = [use for use in USES[cls] if name in use.names.split()]
        here = [use for use in rows if mode in use.modes]
        reasons = [why_not(use, task, given) for use in here]
        if rows and not here:
            modes = dict.fromkeys(mode for use in rows for mode in use.modes)
            doing = "fuses" if mode in MODES else "is"
            reason_of[name] = f"is for {' and '.join(modes)}, but this {doing} {mode}"
        elif here and all(reasons):
            reason_of[name] = reasons[0]
    return reason_of


def why_not(use: Use, task: str, given: set[str]) -> str:
    """Why the settings of a row have no effect, in a mode of the row; empty if they have one."""
    if task not in use.tasks:
        return f"is for {' and '.join(use.tasks)}, but the task is {task}"
    if use.beside and use.beside not in given:
        return f"is for --{use.beside}, which is not given"
    return f"has no effect with --{use.without}" if use.without in given else ""


def use_of(cls: type, name: str) -> str:
    """Where a setting counts, for --help; empty if it counts always."""
    texts = []
    for use in USES.get(cls, ()):
        if name in use.names.split():
            all_modes = {mode for other in USES[cls] for mode in other.modes}
            parts = [] if all_modes <= set(use.modes) else [", ".join(use.modes)]
            parts += [] if use.tasks == ALL_TASKS else [" and ".join(use.tasks)]
            parts += [f"with --{use.beside}"] if use.beside else []
            parts += [f"without --{use.without}"] if use.without else []
            texts.append(", ".join(parts))
    return "; or ".join(texts)


def check_uses(args, mode: str) -> None:
    """UserError if a setting is given that has no effect in this mode and task."""
    task = getattr(args, "task", "all")
    for name, why in without_effect(type(args), mode, task, changed(args)).items():
        raise UserError(f"--{name} {why}")


def check_metrics(args: MetricArgs) -> None:
    """UserError if no flag says what to measure, or if a setting has no effect on that."""
    either("fused", "findings")(args)
    if args.findings and args.one_source:
        raise UserError("give one of --findings and --one_source, not both")
    modes = ("findings", "one_source", "fused")
    check_uses(args, f"--{next(name for name in modes if getattr(args, name))}")


def check_classify(args: ClassifyArgs) -> None:
    """UserError unless exactly one of three modes is asked for, or if a setting has no effect."""
    either("labels", "exploratory", "leakage")(args)
    [asked, *more] = (name for name in ("labels", "exploratory", "leakage") if getattr(args, name))
    if more:
        raise UserError(f"give one of --{asked} and --{more[0]}, not both")
    check_uses(args, f"--{asked}")


def check_training(args: TrainArgs) -> None:
    """UserError if a setting has no effect beside another."""
    check_uses(args, "training")


# --- what test_asfe.py fuses -----------------------------------------------------------------

VOLUMES = (
    *(".nii", ".nii.gz", ".hdr", ".img", ".img.gz"),
    *(".mgz", ".mgh", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".ima"),
)


def mode_of(args: TestArgs) -> str:
    """Which of MODES the settings ask for; UserError if they are not clear."""
    given = {name for name in ("img1", "img2", "dir1", "dir2") if getattr(args, name)}
    if given not in (set(), {"img1", "img2"}, {"dir1", "dir2"}):
        raise UserError("give --img1 with --img2, or --dir1 with --dir2, or none of them")
    if given and (args.demo or not args.out):
        raise UserError("--img1 and --dir1 need --out and go without --demo")
    if "img1" in given:
        to_volume = args.out.name.lower().endswith(VOLUMES)
        volumes = to_volume or is_volume(args.img1) or is_volume(args.img2)
        return "volumes" if volumes else "one pair of images"
    if "dir1" in given:
        return "two folders"
    return "the demo" if args.demo else "the test split"


def is_volume(path: Path) -> bool:
    """Whether a path is a volume: a folder (of DICOM files), a volume's name, or DICOM's mark."""
    if path.is_dir() or path.name.lower().endswith(VOLUMES):
        return True
    return path.suffix.lower() not in EXTENSIONS and path.is_file() and has_dicom_mark(path)


def has_dicom_mark(path: Path) -> bool:
    """Whether a file says that it is DICOM, after the 128 bytes of its preamble."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def stem_of(path: Path) -> str:
    """A file's name without the ending of its format: "ct" of "ct.png" and of "ct.nii.gz"."""
    ends = [end for end in (*VOLUMES, *EXTENSIONS) if path.name.lower().endswith(end)]
    return path.name[: -len(max(ends, key=len))] if ends else path.name


def check_mode(args: TestArgs) -> str:
    """`mode_of`; UserError if a setting was given that has no effect on what is fused."""
    mode = mode_of(args)
    check_uses(args, mode)
    return mode


ONE_PAIRS = {  # settings that a study has not for all of its cases, and what it has
    "mosaic": "a study writes one for each volume",
    "labels": "in a study it is a column of the table",
    "transform": "in a study it is a column of the table",
}


def check_bids(args: StudyArgs) -> None:
    """UserError if settings do not go with a BIDS folder, or without one."""
    if (args.participant_label or args.session_label) and args.bids is None:
        raise UserError("--participant-label and --session-label are for --bids")
    if args.moved and args.bids:
        raise UserError("--moved is for a table or two folders, --bids writes it in any case")


def check_study(args: StudyArgs) -> None:
    """UserError if the settings do not go together."""
    inputs = [args.table, args.bids, args.dir1 and args.dir2]
    if sum(i is not None for i in inputs) != 1 or bool(args.dir1) != bool(args.dir2):
        raise UserError("give a table, or --bids, or --dir1 with --dir2")
    if args.out is None and args.bids is None:
        raise UserError("--out is missing, expected the folder for the fused pairs")
    if args.inside and args.table is None:
        raise UserError("--inside is for a table")
    check_bids(args)
    for name, why in ONE_PAIRS.items():
        if getattr(args, name):
            raise UserError(f"--{name} is for one pair, {why}")
    if bool(args.scheduler) and bool(args.scheduler_file):
        raise UserError("give --scheduler or --scheduler-file, not both")
    if (args.scheduler or args.scheduler_file) and (args.jobs or args.memory):
        raise UserError("--jobs and --memory are for this machine, a cluster has its own")


class Column(NamedTuple):
    """What a table may hold in the column of a setting."""

    kind: type  # bool, int, float, str or Path
    choices: tuple[str, ...] | None
    minimum: float | None
    default: Any


def columns_of(cls: type, names: Collection[str]) -> dict[str, Column]:
    """The columns of a table for some settings of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: Column(
            plain_type(hints[f.name]),
            f.metadata.get("choices"),
            f.metadata.get("minimum"),
            f.default,
        )
        for f in fields(cls)
        if f.name in names
    }
