"""Every setting of the project: edit a default here, or give the flag of the same name.

Each script reads one frozen dataclass below; `parse_args` makes its command line from the fields,
and a flag wins over this file. Nothing is parsed at import. The source of a default is named beside
it: "paper" (Gu et al., BSPC 96, 2024, 106478), "published code" (the authors' repository),
or "ours".
"""

import argparse
import sys
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# task -> folder of source 1 (source 2 is always MRI); the published names
TASKS = {"CT-MRI": "CT", "PET-MRI": "PET", "SPECT-MRI": "SPECT"}
ALL_TASKS = (*TASKS, "all")


@dataclass(frozen=True)
class ModelSize:
    """Widths of the network; the defaults are the published ones (171.0 M parameters in use)."""

    channels: tuple[int, ...] = (64, 112, 160, 208, 256)  # inlayer, then the four encoder blocks
    tail: int = 16  # channels before the last 1x1 convolution
    patch: tuple[int, ...] = (16, 16, 16, 16)  # CASF patch side at each scale, in its pixels
    dim: int = 256  # CASF token width
    heads: int = 8
    experts: int = 4
    slots: int = 256  # per expert
    fft_norm: str = "backward"  # AFF; "ortho" keeps its statistics independent of the image size
    sfef_residual: bool = False  # the published SFEF has none
    # "max": fused = max(img1, img2) + g1 img1 + g2 img2, with gains learned for each pixel
    head: str = "image"


SIZES = {
    "paper": ModelSize(),
    # Ours, with the same modules. A patch side per scale keeps the token count equal at every
    # scale; a head that corrects the brighter source keeps black black and trains in minutes.
    "compact": ModelSize(
        channels=(16, 24, 32, 48, 64),
        tail=32,
        patch=(16, 8, 4, 2),
        dim=96,
        heads=4,
        experts=4,
        slots=16,
        fft_norm="ortho",
        sfef_residual=True,
        head="max",
    ),
}


def setting(default, source: str, help: str, **argparse_kwargs):
    """A dataclass field with its command-line help and its source.

    Extras go to argparse, but for `minimum`, the least value that a number may have.
    """
    return field(default=default, metadata={"help": help, "source": source, **argparse_kwargs})


@dataclass(frozen=True)
class CommonArgs:
    """What training and testing share."""

    DEVICE: str = setting("auto", "ours", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps")
    task: str = setting(
        "CT-MRI", "published code", "fusion task; all: one network for the three", choices=ALL_TASKS
    )
    size: str = setting("compact", "ours", "size of the network", choices=tuple(SIZES))
    data_dir: Path = setting(ROOT / "HMIFDatasets", "published code", "folder of the HMIF data set")
    threads: int = setting(0, "ours", "CPU threads; 0 leaves the choice to PyTorch", minimum=0)


@dataclass(frozen=True)
class TrainArgs(CommonArgs):
    """Settings of train_asfe.py."""

    epoch: int = setting(60, "ours", "passes over the training pairs (published: 2000)", minimum=1)
    lr: float = setting(1e-3, "ours", "highest learning rate of AdamW (published: 2e-4)", minimum=0)
    batch_size: int = setting(
        4, "published code", "pairs in a training step, over all processes", minimum=1
    )
    accumulate: int = setting(
        1, "ours", "parts that a process takes its batch in, one after the other", minimum=1
    )
    patch_size: int = setting(
        128, "ours", "side of the random crop, in pixels (published: 256)", minimum=16
    )
    weight_decay: float = setting(1e-4, "ours", "AdamW's decay of the weights", minimum=0)
    warmup: int = setting(100, "ours", "steps over which the learning rate rises from 0", minimum=0)
    ema: float = setting(0.995, "ours", "decay of the weights' moving average; 0: none", minimum=0)
    recipe: str = setting("detail", "ours", "training loss", choices=("paper", "detail"))
    loss_weights: tuple[str, ...] = setting(
        (), "ours", "other weights of its terms, as gradient=60", nargs="*", metavar="TERM=WEIGHT"
    )
    seed: int = setting(
        3407, "published code", "seed of weights, order and augmentation", minimum=0
    )
    init: Path | None = setting(None, "ours", "weights to start from instead of random ones")
    freeze_batchnorm: bool = setting(
        False, "ours", "train with the statistics of --init, those that fusing uses"
    )
    precision: str = setting(
        "auto",
        "ours",
        "arithmetic: bf16 or fp16 (mixed), tf32, fp32; auto is bf16 on CUDA, else fp32",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
    )
    compile: bool = setting(False, "ours", "compile the network with torch.compile")
    workers: int = setting(0, "ours", "processes that cut the patches", minimum=0)
    # validation: on patients that training does not see
    val: float = setting(
        0.1, "ours", "share of each task's pairs kept for validation, whole patients", minimum=0
    )
    val_cases: tuple[str, ...] = setting(
        (), "ours", "case numbers to validate on, in place of --val", nargs="*", metavar="CASE"
    )
    leave_out: tuple[str, ...] = setting(
        (), "ours", "case numbers that take no part at all", nargs="*", metavar="CASE"
    )
    val_every: int = setting(5, "ours", "epochs between validations", minimum=1)
    patience: int = setting(
        0, "ours", "stop after so many validations without a better one; 0: never", minimum=0
    )
    # the run
    save_dir: Path = setting(ROOT / "modelsave", "published code", "where the weights are written")
    save_every: int = setting(
        1, "ours", "epochs between checkpoints; one more when a run ends or stops", minimum=1
    )
    resume: bool = setting(
        False, "ours", "go on with the run in --save_dir, from its last checkpoint"
    )
    minutes: float = setting(
        0, "ours", "stop at the end of an epoch after so many minutes; 0: never", minimum=0
    )


@dataclass(frozen=True)
class VolumeArgs(CommonArgs):
    """What test_asfe.py needs for volumes only; see volumes.py."""

    series1: str | None = setting(
        None, "ours", "which series of the DICOM folder --img1: its number in the list, or its UID"
    )
    series2: str | None = setting(None, "ours", "the same for --img2")
    window: str = setting(
        "wide",
        "ours",
        "CT in HU: LEVEL,WIDTH, or wide (-100 to 1000), brain, bone, subdural",
    )
    suv: float = setting(
        15.0,
        "ours",
        "PET: the SUV (body weight) that becomes 1; 0: the maximum does",
        minimum=0,
    )
    axis: str = setting(
        "auto",
        "ours",
        "slices that go through the network; auto: those with the finest pixels, else axial",
        choices=("auto", "axial", "coronal", "sagittal"),
    )
    tile: int = setting(0, "ours", "side of the tiles of a slice, in pixels; 0: none", minimum=0)
    overlap: int = setting(64, "ours", "pixels over which tiles blend", minimum=1)
    colour: str | None = setting(
        None,
        "ours",
        "PET and SPECT: also write an RGB volume, in the colours of this table",
        choices=("hot", "rainbow", "jet", "inferno"),
    )
    png: Path | None = setting(None, "ours", "folder for the fused slices as PNG")
    mosaic: Path | None = setting(None, "ours", "PNG with a choice of fused slices to look at")
    nan_to_zero: bool = setting(False, "ours", "take voxels that are not finite as 0")
    force: bool = setting(
        False, "ours", "fuse although modality, frame of reference, overlap or place is in doubt"
    )


@dataclass(frozen=True)
class TestArgs(VolumeArgs):
    """Settings of test_asfe.py."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    weights: Path | None = setting(
        None, "ours", "weights file; without it model_pre/<size>_<task>.safetensors"
    )
    aff: str = setting(
        "auto",
        "ours",
        "inverse transform of AFF: full (as in the paper), published (as in the authors' code); "
        "auto: published for their checkpoints, else full",
        choices=("auto", "full", "published"),
    )
    img1: Path | None = setting(None, "ours", "one pair: source 1 (CT, PET or SPECT)")
    img2: Path | None = setting(None, "ours", "one pair: source 2 (MRI)")
    dir1: Path | None = setting(None, "ours", "two folders: source 1")
    dir2: Path | None = setting(None, "ours", "two folders: source 2, paired by file name")
    out: Path | None = setting(
        None, "ours", "output file of --img1/--img2, else folder; default result/<task>"
    )
    demo: bool = setting(False, "ours", "fuse three drawn phantom pairs; needs no data")
    cases: tuple[str, ...] = setting(
        (), "ours", "only these case numbers of the test split", nargs="*", metavar="CASE"
    )
    skip_unmatched: bool = setting(False, "ours", "leave out files without a partner")
    batch_size: int = setting(
        4, "ours", "pairs of equal size that go through the network together", minimum=1
    )
    stretch: bool = setting(
        False, "published code", "min-max stretch of each fused image instead of a clip to [0, 1]"
    )
    metrics: bool = setting(False, "ours", "print the metrics of what was written")
    contact_rows: int = setting(
        6, "ours", "pairs shown on the contact sheet; 0 writes none", minimum=0
    )


@dataclass(frozen=True)
class DataArgs:
    """Settings of dataset.py run as a script."""

    download: bool = setting(False, "ours", "fetch the HMIF data set and verify it")
    check: bool = setting(True, "ours", "print what is there per task, and what is wrong")
    data_dir: Path = setting(ROOT / "HMIFDatasets", "published code", "folder of the HMIF data set")


@dataclass(frozen=True)
class MetricArgs:
    """Settings of metrics.py run as a script."""

    fused: tuple[str, ...] = setting(
        (),
        "ours",
        "folders of fused images to compare, as FOLDER or NAME=FOLDER",
        nargs="+",
        metavar="FOLDER",
    )
    task: str = setting("CT-MRI", "published code", "fusion task", choices=tuple(TASKS))
    data_dir: Path = setting(ROOT / "HMIFDatasets", "published code", "folder of the HMIF data set")
    dir1: Path | None = setting(None, "ours", "source 1 in another folder than the task's test set")
    dir2: Path | None = setting(None, "ours", "source 2 (MRI) for --dir1, paired by file name")
    skip_unmatched: bool = setting(False, "ours", "leave out images that are not there everywhere")
    metrics: tuple[str, ...] = setting(
        (), "ours", "metrics to compute; without it the panel of 19", nargs="+", metavar="METRIC"
    )
    jobs: int = setting(0, "ours", "processes; 0: one for each core", minimum=0)
    rank: bool = setting(False, "ours", "add the mean rank over all metrics")
    between: tuple[str, ...] = setting(
        (),
        "ours",
        "two methods to test against each other: paired Wilcoxon, bootstrap 95 % interval",
        nargs=2,
        metavar=("A", "B"),
    )
    seed: int = setting(3407, "ours", "seed of the bootstrap", minimum=0)
    csv: Path | None = setting(None, "ours", "write each image and the means")
    json: Path | None = setting(None, "ours", "write the same with ranks and differences")
    markdown: Path | None = setting(None, "ours", "write the table of means")
    latex: Path | None = setting(None, "ours", "write the table of means")
    plot: Path | None = setting(None, "ours", "write a panel for each metric, a dot for each image")


@dataclass(frozen=True)
class ExportArgs:
    """Settings of export_onnx.py."""

    DEVICE: str = setting("cpu", "ours", "device of the PyTorch side of the comparison")
    task: str = setting("CT-MRI", "published code", "fusion task, or all", choices=ALL_TASKS)
    size: str = setting("compact", "ours", "size of the network", choices=tuple(SIZES))
    weights: Path | None = setting(
        None, "ours", "weights file; without it model_pre/<size>_<task>.safetensors"
    )
    aff: str = setting("auto", "ours", "as in test_asfe.py", choices=("auto", "full", "published"))
    out: Path | None = setting(None, "ours", "default result/<size>_<task>.onnx")
    threads: int = setting(0, "ours", "CPU threads; 0 leaves the choice to PyTorch", minimum=0)


@dataclass(frozen=True)
class AppArgs:
    """Settings of app.py."""

    DEVICE: str = setting("cpu", "ours", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps")
    weights_dir: Path = setting(
        ROOT / "model_pre", "ours", "folder of the *.safetensors that the page offers"
    )
    host: str = setting("127.0.0.1", "ours", "address to listen on; 0.0.0.0 opens it to others")
    port: int = setting(7860, "ours", "port to listen on; 0 takes a free one", minimum=0)
    max_mb: float = setting(16, "ours", "largest file that may be uploaded, in MB", minimum=0)
    max_side: int = setting(1024, "ours", "longest side of an image, in pixels", minimum=16)
    keep_minutes: float = setting(
        10, "ours", "age at which uploads and results are removed", minimum=1
    )
    threads: int = setting(0, "ours", "CPU threads; 0 leaves the choice to PyTorch", minimum=0)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line (and, as ever, exit code 2)."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def get_args_parser(cls: type, description: str = "") -> argparse.ArgumentParser:
    """The command line of a settings dataclass: one flag for each field, named like the field."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        extras = dict(f.metadata)
        source, text = extras.pop("source"), extras.pop("help")
        extras.pop("minimum", None)
        shown = f.default.name if isinstance(f.default, Path) else f.default
        extras["help"] = f"{text} (default {shown}; {source})".replace("%", "%%")
        if hints[f.name] is bool:
            extras["action"] = argparse.BooleanOptionalAction
        elif "action" not in extras:
            extras["type"] = _plain_type(hints[f.name])
        spellings = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        parser.add_argument(*spellings, default=f.default, **extras)
    return parser


def _plain_type(hint):
    """Path | None -> Path: argparse wants something it can call; None is only ever a default."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def parse_args(cls: type, argv: list[str] | None = None, description: str = ""):
    """Parse `argv` (default: the command line) into an instance of `cls`; errors exit with 2."""
    parser = get_args_parser(cls, description)
    args = cls(**vars(parser.parse_args(argv)))
    for f in fields(cls):  # argparse does not check a default that was edited in this file
        value, choices = getattr(args, f.name), f.metadata.get("choices")
        if choices and value is not None and value not in choices:
            parser.error(f"{f.name} is {value!r}, expected one of {', '.join(choices)}")
        if "minimum" in f.metadata and not value >= f.metadata["minimum"]:
            parser.error(f"{f.name} is {value}, expected at least {f.metadata['minimum']}")
    return args


def run_script(main, args) -> None:
    """Run a script's `main(args)`; what the user can mend ends in one line and exit code 2."""
    try:
        main(args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
