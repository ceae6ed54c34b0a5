"""Every setting of the project: edit a default here, or give the flag of the same name.

Each command reads one frozen dataclass below; cli.py makes its flags from the fields, and a flag
wins over this file. A task or size edited in CommonArgs, or a folder in DATA_DIR, counts for every
command that has such a setting. Where a setting has an effect is in a table in cli.py. A default is
our own choice unless its source is "published code", the authors' repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "HMIFDatasets"  # of the data set

MODULES = ("casf", "aff", "sfef", "blend")  # what a network can be trained without

VERSION = "0.1.0"  # of the software, as in CITATION.cff
# task -> folder of source 1 (source 2 is always MRI); the published names
TASKS = {"CT-MRI": "CT", "PET-MRI": "PET", "SPECT-MRI": "SPECT"}
ALL_TASKS = (*TASKS, "all")
EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")  # of images
CASE_PATTERN = r"(\d+)\d{3}"  # of a file's name in HMIF: the case, then three digits of the slice


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
    # What the decoder makes. "image": the fused image. "bands": gains that are added to a blend of
    # both images, one for each source in each of three bands of frequencies. "blend": two gains
    # only, those of weights from before 2026-12.
    head: str = "image"
    casf: bool = True  # these three can be left out: `train_asfe.py --without`, for an ablation
    aff: bool = True
    sfef: bool = True

    def __post_init__(self):
        choices = {"fft_norm": ("backward", "ortho"), "head": ("image", "blend", "bands")}
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                got = getattr(self, name)
                raise ValueError(f"{name} is {got!r}, expected {' or '.join(expected)}")

    def without(self, modules: Sequence[str]) -> "ModelSize":
        """The same widths without some of MODULES."""
        parts = {name: False for name in modules if name != "blend"}
        return replace(self, **parts | ({"head": "image"} if "blend" in modules else {}))


SIZES = {
    "paper": ModelSize(),
    # Ours, with the same modules. A patch side per scale keeps the token count equal at every
    # scale; a head that corrects a blend keeps black black, and findings from the start on.
    "compact": ModelSize(
        channels=(16, 16, 32, 48, 64),
        tail=32,
        patch=(16, 8, 4, 2),
        dim=96,
        heads=4,
        experts=4,
        slots=16,
        fft_norm="ortho",
        sfef_residual=True,
        head="bands",
    ),
}


def shipped_path(size: str, task: str) -> Path:
    """The file of the weights of a size for a task, else for all; not every size is shipped."""
    folder = ROOT / "model_pre"
    own = folder / f"{size}_{task}.safetensors"
    return own if own.is_file() else folder / f"{size}_all.safetensors"


LEVELS_HELP = (
    "values that become black and white, one setting or one a source: auto (16 bits: as the file "
    "declares, else 65535 is white), full (255 or 65535), or LOW,HIGH"
)
PATTERN_HELP = "regular expression for a whole file name (no extension); its first group: the case"


def setting(default, help: str, source: str = "ours", **argparse_kwargs):
    """A dataclass field with its command-line help and the source of its default.

    Extras go to argparse, but for `minimum`, the least value that a number may have.
    """
    return field(default=default, metadata={"help": help, "source": source, **argparse_kwargs})


@dataclass(frozen=True)
class CommonArgs:
    """What most commands share: a task or size edited here counts for all of them."""

    DEVICE: str = setting("auto", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps")
    task: str = setting(
        "CT-MRI", "fusion task; all: one network for the three", "published code", choices=ALL_TASKS
    )
    size: str = setting("compact", "size of the network", choices=tuple(SIZES))
    threads: int = setting(0, "CPU threads; 0 leaves the choice to PyTorch", minimum=0)


@dataclass(frozen=True)
class TrainArgs(CommonArgs):
    """Settings of train_asfe.py."""

    data_dir: Path = setting(DATA_DIR, "folder of the HMIF data set", "published code")
    epoch: int = setting(60, "passes over the training pairs (published: 2000)", minimum=1)
    lr: float = setting(1.5e-3, "highest learning rate of AdamW (published: 2e-4)", minimum=0)
    batch_size: int = setting(
        4, "pairs in a training step, over all processes", "published code", minimum=1
    )
    accumulate: int = setting(
        1, "parts that a process takes its batch in, one after the other", minimum=1
    )
    patch_size: int = setting(
        128, "side of the random crop, in pixels (published: 256)", minimum=16
    )
    stages: tuple[str, ...] = setting(
        (),
        "parts of one run with crops of other sizes, in place of --patch_size, --batch_size and "
        "--epoch: as 64x8x200 256x4x10:frozen, frozen with BatchNorm's statistics of whole images",
        nargs="+",
        metavar="PATCHxBATCHxEPOCHS",
    )
    weight_decay: float = setting(1e-2, "AdamW's decay of the weights", minimum=0)
    warmup: int = setting(100, "steps over which the learning rate rises from 0", minimum=0)
    cooldown: float = setting(
        0.3, "share of all steps, at the end, over which the learning rate falls to 0", minimum=0
    )
    ema: float = setting(0.995, "decay of the weights' moving average; 0: none", minimum=0)
    recipe: str = setting("sources", "training loss", choices=("paper", "sources"))
    loss_weights: tuple[str, ...] = setting(
        (), "other weights of its terms, as gradient=60", nargs="*", metavar="TERM=WEIGHT"
    )
    seed: int = setting(
        3407, "seed of weights, order and augmentation", "published code", minimum=0
    )
    init: Path | None = setting(None, "weights to start from instead of random ones")
    without: tuple[str, ...] = setting(
        (), "modules that the network lacks, for an ablation", nargs="+", choices=MODULES
    )
    aff: str = setting(
        "full",
        "inverse transform of AFF: as in the paper, or as in the authors' code",
        choices=("full", "published"),
    )
    precision: str = setting(
        "auto",
        "arithmetic: bf16 or fp16 (mixed), tf32, fp32; auto is bf16 on CUDA cards that have it in "
        "hardware, else fp32",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
    )
    compile: bool = setting(False, "compile the network with torch.compile")
    workers: int = setting(0, "processes that cut the patches", minimum=0)
    levels: tuple[str, ...] = setting((), LEVELS_HELP, nargs="+", metavar="LEVELS")
    # validation: on people that training does not see, see HMIFDatasets/people.csv
    case_pattern: str = setting(CASE_PATTERN, PATTERN_HELP)
    val: float = setting(
        0.1, "share of each task's pairs kept for validation, whole people", minimum=0
    )
    val_cases: tuple[str, ...] = setting(
        (),
        "validate on the people of these cases, not by --val; as 16, or PET:41 where several tasks "
        "have the number",
        nargs="*",
        metavar="CASE",
    )
    leave_out: tuple[str, ...] = setting(
        (), "the people of these cases take no part at all", nargs="*", metavar="CASE"
    )
    val_every: int = setting(5, "epochs between validations", minimum=1)
    patience: int = setting(
        0, "stop after so many validations without a better one; 0: never", minimum=0
    )
    # the run
    save_dir: Path = setting(ROOT / "modelsave", "where the weights are written", "published code")
    name: str | None = setting(
        None, "name of the run, with which its files begin; without it <size>_<task>"
    )
    overwrite: bool = setting(False, "replace the run of this name in --save_dir")
    save_every: int = setting(
        1, "epochs between checkpoints; one more when a run ends or stops", minimum=1
    )
    resume: bool = setting(False, "go on with the run in --save_dir, from its last checkpoint")
    minutes: float = setting(
        0, "stop at the end of an epoch after so many minutes; 0: never", minimum=0
    )


@dataclass(frozen=True)
class WeightsArgs(CommonArgs):
    """What names a trained network."""

    weights: Path | None = setting(
        None, "weights file; without it model_pre/<size>_<task>.safetensors"
    )
    aff: str = setting(
        "auto",
        "inverse transform of AFF: full (as in the paper), published (as in the authors' code); "
        "auto: published for their checkpoints, else full",
        choices=("auto", "full", "published"),
    )


@dataclass(frozen=True)
class VolumeArgs(WeightsArgs):
    """What test_asfe.py needs for volumes only; see volumes/."""

    series1: str | None = setting(
        None, "which series of the DICOM folder --img1: its number in the list, or its UID"
    )
    series2: str | None = setting(None, "the same for --img2")
    where: str = setting(
        "",
        "which images of a DICOM series with several at one place, as EchoTime=80,ImageType=M",
        metavar="FIELD=VALUE",
    )
    frame: str = setting(
        "",
        "which point in time of a series or 4-D file, from 1; or the mean or the sum of all",
        metavar="N|mean|sum",
    )
    affine: str = setting(
        "sform", "which place counts in a NIfTI file with two", choices=("sform", "qform")
    )
    window: str = setting(
        "wide", "CT in HU: LEVEL,WIDTH, or wide (-100 to 1000), brain, bone, subdural"
    )
    suv: float = setting(
        15.0, "PET: the SUV (body weight) that becomes 1; 0: the maximum does", minimum=0
    )
    axis: str = setting(
        "auto",
        "slices that go through the network; auto: those with the finest pixels, else axial",
        choices=("auto", "axial", "coronal", "sagittal"),
    )
    tile: int = setting(0, "side of the tiles of a slice, in pixels; 0: none", minimum=0)
    overlap: int = setting(64, "pixels over which tiles blend", minimum=1)
    colour: str = setting(
        "auto",
        "PET and SPECT: colours of the RGB volume that is written beside the grey one; auto: warm; "
        "the last four are DICOM's",
        choices=(
            *("auto", "none", "warm", "hot", "rainbow", "jet", "inferno"),
            *("hot-iron", "pet", "hot-metal-blue", "pet-20-step"),
        ),
    )
    rgb: str = setting(
        "type",
        "how the RGB volume holds its colours: in NIfTI's RGB type, or on a fourth axis of R, G "
        "and B, which get_fdata() of nibabel reads",
        choices=("type", "axis"),
    )
    png: Path | None = setting(None, "folder for the fused slices as PNG")
    mosaic: Path | None = setting(None, "PNG with a choice of fused slices to look at")
    dicom: Path | None = setting(
        None,
        "new folder for the fused slices as a DICOM series, and a presentation state that blends "
        "the untouched sources; by highdicom; names nobody",
    )
    moved: Path | None = setting(
        None,
        "NIfTI file for the source without the grid: resampled onto it, in its own unit (SUV, "
        "Bq/ml, HU, or as stored)",
        metavar="FILE",
    )
    transform: Path | None = setting(
        None,
        "file for the transform, by its ending: .tfm or .txt (ITK), .mat (FSL), .lta (FreeSurfer), "
        ".aff12.1D (AFNI)",
        metavar="FILE",
    )
    labels: Path | None = setting(
        None,
        "a segmentation of either source (whole numbers, or DICOM SEG): it comes along onto the "
        "grid of the result, as <out>_labels",
        metavar="FILE",
    )
    labels_of: str = setting(
        "auto",
        "which source --labels belongs to; auto: its grid or DICOM frame of reference tells",
        choices=("auto", "1", "2"),
    )
    keep_patient: bool = setting(
        False, "copy patient and study from the DICOM source that has the grid"
    )
    nan_to_zero: bool = setting(False, "take voxels that are not finite as 0")
    grid: str = setting(
        "auto",
        "voxels of the output: those of source 1 or 2, or cubes of so many mm; auto: the MRI's for "
        "PET and SPECT, the finer ones in plane for CT",
        metavar="auto|1|2|MM",
    )
    register: str = setting(
        "auto",
        "rigid: move source 2 onto source 1; check: only measure; off; or a file with a transform "
        "of ITK, FSL, FreeSurfer, AFNI or DICOM; auto: check in one frame of reference, else "
        "rigid; images also: similarity, and auto is off",
        metavar="auto|off|check|rigid|FILE",
    )
    via: Path | None = setting(
        None, "a CT that came with --img1, a PET or SPECT: it is registered in its place"
    )
    force: str = setting(
        "",
        "fuse although something is in doubt: of modality, space, place, overlap, registration, "
        "units, patient, with commas between; without a name all but patient",
        nargs="?",
        const="all",
        metavar="WHAT",
    )


@dataclass(frozen=True)
class TestArgs(VolumeArgs):
    """Settings of test_asfe.py."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    data_dir: Path = setting(DATA_DIR, "folder of the HMIF data set", "published code")
    img1: Path | None = setting(None, "one pair: source 1 (CT, PET or SPECT)")
    img2: Path | None = setting(None, "one pair: source 2 (MRI)")
    dir1: Path | None = setting(None, "two folders: source 1")
    dir2: Path | None = setting(None, "two folders: source 2, paired by file name")
    out: Path | None = setting(
        None, "output file of --img1/--img2, else folder; default result/<task>"
    )
    demo: bool = setting(False, "fuse three drawn phantom pairs; needs no data")
    levels: tuple[str, ...] = setting((), LEVELS_HELP, nargs="+", metavar="LEVELS")
    page: tuple[int, ...] = setting(
        (),
        "page of files that have several, from 1; one number, or one a source",
        nargs="+",
        metavar="N",
    )
    cases: tuple[str, ...] = setting(
        (), "only these case numbers of the test split", nargs="*", metavar="CASE"
    )
    case_pattern: str = setting(CASE_PATTERN, PATTERN_HELP)
    skip_unmatched: bool = setting(False, "leave out files without a partner")
    batch_size: int = setting(
        4, "pairs of equal size that go through the network together", minimum=1
    )
    stretch: bool = setting(
        False, "min-max stretch of each fused image instead of a clip to [0, 1]", "published code"
    )
    metrics: bool = setting(False, "print the metrics of what was written")
    contact_rows: int = setting(6, "pairs shown on the contact sheet; 0 writes none", minimum=0)


@dataclass(frozen=True)
class StudyArgs(VolumeArgs):
    """Settings of study.py; those of one pair count for every case that its table leaves open."""

    table: Path | None = setting(
        None, "CSV with the columns img1, img2 and settings of a case", positional=True
    )
    bids: Path | None = setting(
        None, "BIDS folder: *_ct and *_pet with *_T1w, *_T2w and *_FLAIR of one subject"
    )
    participant_label: tuple[str, ...] = setting(
        (), "--bids: only these subjects, with or without sub-", nargs="+", metavar="LABEL"
    )
    session_label: tuple[str, ...] = setting(
        (), "--bids: only these sessions, with or without ses-", nargs="+", metavar="LABEL"
    )
    dir1: Path | None = setting(None, "two folders: source 1, images or volumes")
    dir2: Path | None = setting(None, "two folders: source 2, paired by file name")
    skip_unmatched: bool = setting(False, "two folders: leave out files without a partner")
    out: Path | None = setting(
        None, "folder of everything that is written; --bids: its derivatives/asfe-fusion"
    )
    inside: bool = setting(False, "refuse paths that lie outside of the table's folder")
    stretch: bool = setting(
        TestArgs.stretch, "images: min-max stretch of each fused image", "published code"
    )
    jobs: int = setting(0, "processes on this machine; 0: one for every two cores", minimum=0)
    memory: float = setting(
        0, "GB that each process may use; 0: an equal share of the machine's", minimum=0
    )
    scheduler: str | None = setting(
        None, "address of a Dask cluster that runs the cases in place of --jobs"
    )
    scheduler_file: Path | None = setting(None, "the same, by the file that its scheduler wrote")


@dataclass(frozen=True)
class DataArgs:
    """Settings of dataset.py run as a script."""

    download: bool = setting(False, "fetch the HMIF data set and verify it")
    check: bool = setting(True, "print what is there per task, and what is wrong")
    data_dir: Path = setting(DATA_DIR, "folder of the HMIF data set", "published code")


@dataclass(frozen=True)
class MetricArgs:
    """Settings of metrics.py run as a script."""

    fused: tuple[str, ...] = setting(
        (),
        "folders of fused images to compare, as FOLDER or NAME=FOLDER",
        nargs="+",
        metavar="FOLDER",
    )
    one_source: bool = setting(
        False, "measure what the folders keep of that which only one source shows"
    )
    maps: Path | None = setting(
        None, "folder for a picture of each pair: what is lost, and where, and what is foreign"
    )
    per_person: bool = setting(False, "print the means of each person, too")
    findings: bool = setting(
        False, "plant findings and measure what is kept of them, in place of comparing folders"
    )
    method: tuple[str, ...] = setting(
        (),
        "other methods, as NAME=FILE.onnx or NAME=COMMAND with {1}, {2} and {out}",
        nargs="+",
        metavar="METHOD",
    )
    weights: Path | None = setting(None, "weights of ours; without it the shipped ones")
    size: str = setting(CommonArgs.size, "size of ours", choices=tuple(SIZES))
    split: str = setting("test", "split of the task", choices=("test", "train"))
    cases: tuple[str, ...] = setting(
        (), "only these case numbers of the split", nargs="*", metavar="CASE"
    )
    case_pattern: str = setting(CASE_PATTERN, PATTERN_HELP)
    levels: tuple[str, ...] = setting((), LEVELS_HELP, nargs="+", metavar="LEVELS")
    task: str = setting(CommonArgs.task, "fusion task", "published code", choices=tuple(TASKS))
    data_dir: Path = setting(DATA_DIR, "folder of the HMIF data set", "published code")
    dir1: Path | None = setting(None, "source 1 in another folder than the task's test set")
    dir2: Path | None = setting(None, "source 2 (MRI) for --dir1, paired by file name")
    skip_unmatched: bool = setting(False, "leave out images that are not there everywhere")
    metrics: tuple[str, ...] = setting(
        (), "metrics to compute; without it the panel of 19", nargs="+", metavar="METRIC"
    )
    jobs: int = setting(0, "processes; 0: one for each core", minimum=0)
    rank: bool = setting(False, "add the mean rank over all metrics")
    between: tuple[str, ...] = setting(
        (),
        "two methods to test against each other, by people: Wilcoxon, bootstrap 95 % interval",
        nargs=2,
        metavar=("A", "B"),
    )
    seed: int = setting(3407, "seed of the bootstrap and of the planted findings", minimum=0)
    csv: Path | None = setting(None, "write each image and the means")
    json: Path | None = setting(None, "write the same with ranks and differences")
    markdown: Path | None = setting(None, "write the table of means")
    latex: Path | None = setting(None, "write the table of means")
    plot: Path | None = setting(None, "write a panel for each metric, a dot for each image")


@dataclass(frozen=True)
class ExportArgs(WeightsArgs):
    """Settings of export_onnx.py."""

    DEVICE: str = setting("cpu", "device of the PyTorch side of the comparison")
    out: Path | None = setting(None, "default result/<size>_<task>.onnx")


@dataclass(frozen=True)
class AppArgs:
    """Settings of app.py."""

    DEVICE: str = setting("cpu", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps")
    weights_dir: Path = setting(
        ROOT / "model_pre", "folder of the *.safetensors that the page offers"
    )
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 opens it to others")
    port: int = setting(7860, "port to listen on; 0 takes a free one", minimum=0)
    max_mb: float = setting(16, "largest upload of an image, in MB (2^20 bytes)", minimum=0)
    max_side: int = setting(1024, "longest side of an image, in pixels", minimum=16)
    volume_mb: float = setting(
        256, "largest upload of a volume, in MB; a zip may unpack to 4 times", minimum=0
    )
    volume_voxels: float = setting(64, "voxels of a volume or series, in millions", minimum=0)
    keep_minutes: float = setting(10, "age at which uploads and results are removed", minimum=1)
    threads: int = setting(0, "CPU threads; 0 leaves the choice to PyTorch", minimum=0)


@dataclass(frozen=True)
class ClassifyArgs:
    """Settings of classify_asfe.py."""

    labels: Path | None = setting(None, "CSV with the columns image, person, label (two labels)")
    dir1: Path | None = setting(None, "folder of source 1")
    dir2: Path | None = setting(None, "folder of source 2")
    fused: Path | None = setting(None, "folder of the fused images, of the same names")
    exploratory: bool = setting(False, "vascular against degenerative people of SPECT-MRI")
    leakage: bool = setting(False, "random labels of people, split by slices and by people")
    data_dir: Path = setting(DATA_DIR, "folder of the HMIF data set")
    features: str = setting(
        "auto",
        "backbone: ResNet-18, its weights where torch.hub keeps them; radiomic: texture and "
        "histogram; auto: backbone if its weights are there",
        choices=("auto", "backbone", "radiomic"),
    )
    folds: int = setting(5, "folds; no person is in two, each has both labels", minimum=2)
    draws: int = setting(200, "permutations, bootstrap samples or random labels", minimum=1)
    seed: int = setting(3407, "seed of the folds and draws", minimum=0)
    plot: Path | None = setting(None, "write the figure (PNG)")
