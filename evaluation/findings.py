"""What a fusion keeps of a finding that only one source shows.

A soft disc is planted into one source, brighter or darker by a quarter of the range, inside of the
head. The pair is fused without and with it. Its contrast is the mean of the disc less the mean of
the ring around it; what counts is how the contrast changed:

    share = change of contrast in the fused image / change of contrast in the source

1 keeps the finding as it was, 0 loses it, below 0 turns it around. d' is the change of contrast in
the fused image over the standard deviation of the fused image in the ring without the finding: how
far it stands out from what lies around it. In a colour image the contrast is also a distance in
CIELAB. docs/metrics.md has every constant.

Positions follow from the seed and the name of the pair, so they are the same for every method. This
needs a method that can be run: a function of two lumas, see `methods_of`.

Legend: lumas are (H, W) float32 in [0, 1].
"""

import csv
import io
import math
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from scipy import ndimage
from skimage.color import rgb2lab
from tqdm import tqdm

from args_setting import TASKS, MetricArgs
from cli import UserError, visible
from dataset import Pair, read_pair
from evaluation.compare import named_pairs
from evaluation.tables import aligned, named_files
from evaluation.trivial import TRIVIAL
from images import read_luma8, to_uint8, write_bytes, write_png
from inference import optimise
from phantom import finding, seed_of
from weights import load_weights, shipped_path

CONTRAST = 0.25  # of the range
RADII = (3, 6)  # of the discs, pixels
DISCS = 4  # planted together into a source, far apart
APART = 40  # pixels between the centres of discs, at least
GAP, RING = 2, 5  # pixels between a disc and its ring, and the width of the ring
HEAD, RIM = 0.05, 20  # the head is where a source is brighter; pixels of scalp and skull around it
ROOM = 0.8  # the least share of the contrast that must fit between black and white in the source

Method = Callable[[ndarray, ndarray], ndarray]


@dataclass(frozen=True)
class Kind:
    """A kind of finding: in which source, brighter or darker, how large."""

    source: int  # 0 or 1
    sign: int  # 1 or -1
    radius: int

    def name(self, task: str) -> str:
        """Such as "PET+": kinds of a name differ in their radius only."""
        return (TASKS[task], "MRI")[self.source] + ("+" if self.sign > 0 else "−")


KINDS = [Kind(s, sign, r) for s in (0, 1) for sign in (1, -1) for r in RADII]


@dataclass(frozen=True)
class Planted:
    """One finding and what a method made of it."""

    kind: Kind
    pair: str
    centre: tuple[int, int]  # row and column
    share: float
    d_prime: float
    colour: float  # share of the distance in CIELAB; NaN of grey images


def measure_findings(method: Method, pairs: list[Pair], seed: int, title: str) -> list[Planted]:
    """Plant findings of every kind into every pair and measure what the method keeps of them."""
    found = []
    for pair in tqdm(pairs, title, unit="pair", leave=False, disable=None):
        *sources, chroma = read_pair(pair)
        sources = np.stack(sources)  # (2, H, W)
        fused, inside = stored(method(*sources)), inside_of(sources)
        for kind in KINDS:
            centres = positions(sources, inside, kind, seed_of(seed, pair.name, *astuple(kind)))
            planted = plant_discs(sources, kind, centres)
            source, planted_source = sources[kind.source], planted[kind.source]
            fused_planted = stored(method(*planted))
            change, response = planted_source - source, fused_planted - fused
            if chroma is not None:  # the MRI has none
                own = chroma if kind.source == 0 else None
                coloured = lab(planted_source, own) - lab(source, own)
                coloured_response = lab(fused_planted, chroma) - lab(fused, chroma)
            for centre in centres:
                disc, ring = regions(fused.shape, centre, kind.radius)
                kept = contrast(response, disc, ring)
                noise = max(float(fused[ring].std()), 1 / 255)
                share = float(kept / contrast(change, disc, ring))
                colour = math.nan
                if chroma is not None:
                    distance = np.linalg.norm(contrast(coloured_response, disc, ring))
                    colour = float(distance / np.linalg.norm(contrast(coloured, disc, ring)))
                d_prime = float(kind.sign * kept / noise)
                found.append(Planted(kind, pair.name, centre, share, d_prime, colour))
    return found


def contrast(image: ndarray, disc: ndarray, ring: ndarray) -> ndarray:
    """The mean of (H, W) or (H, W, 3) in the disc, less that in the ring."""
    return image[disc].mean(0) - image[ring].mean(0)


def lab(luma: ndarray, chroma: ndarray | None) -> ndarray:
    """CIELAB (H, W, 3), D65, of the 8-bit RGB image of a luma and a chroma (None: grey)."""
    rgb = to_uint8(luma, np.zeros((1, 1, 3), np.float32) if chroma is None else chroma)
    return rgb2lab(rgb).astype(np.float32)


def stored(fused: ndarray) -> ndarray:
    """A fused luma with the levels that an 8-bit file would have."""
    return to_uint8(fused).astype(np.float32) / 255


def inside_of(sources: ndarray) -> ndarray:
    """The pixels (H, W) inside of the skull."""
    head = ndimage.binary_fill_holes(sources.max(0) > HEAD)
    return ndimage.distance_transform_edt(head) > RIM


def positions(sources: ndarray, inside: ndarray, kind: Kind, seed: int) -> list[tuple[int, int]]:
    """Up to DISCS centres inside of the skull where the contrast fits into the source."""
    reach = kind.radius + GAP + RING
    luma = sources[kind.source]
    space = (1 - luma if kind.sign > 0 else luma) >= ROOM * CONTRAST
    possible = space & inside
    possible[:reach], possible[-reach:] = False, False
    possible[:, :reach], possible[:, -reach:] = False, False
    centres: list[tuple[int, int]] = []
    for row, column in np.random.default_rng(seed).permutation(np.argwhere(possible)):
        distant = all(np.hypot(row - r, column - c) >= APART for r, c in centres)
        if distant and space[regions(luma.shape, (row, column), kind.radius)[0]].mean() >= ROOM:
            centres.append((int(row), int(column)))
        if len(centres) == DISCS:
            break
    return centres


def plant_discs(sources: ndarray, kind: Kind, centres: list[tuple[int, int]]) -> ndarray:
    """(2, H, W) with a disc of the kind at each centre, clipped to [0, 1]."""
    planted = sources.copy()
    for centre in centres:
        share = finding("disc", sources.shape[1:], centre, kind.radius)
        planted[kind.source] += kind.sign * CONTRAST * share
    return planted.clip(0, 1)


def regions(
    shape: tuple[int, int], centre: tuple[int, int], radius: int
) -> tuple[ndarray, ndarray]:
    """The pixels (H, W) of a disc, and of the ring around it."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot(y - centre[0], x - centre[1])
    inner = radius + GAP
    return distance <= radius, (distance > inner) & (distance <= inner + RING)


# --- methods ---------------------------------------------------------------------------------


def methods_of(args: MetricArgs) -> dict[str, Method]:
    """Ours, the trivial fusions, and what --method names, by name."""
    model, _ = load_weights(args.weights or shipped_path(args.size, args.task))
    model = optimise(model)
    methods: dict[str, Method] = {"ours": lambda a, b: model.fuse(a, b).numpy()}
    for name, fuse in TRIVIAL.items():
        methods[name] = lambda a, b, fuse=fuse: fuse(to_uint8(a), to_uint8(b)) / np.float32(255)
    for text in args.method:
        name, sign, what = text.partition("=")
        if not sign or not name or name in methods:
            raise UserError(f"--method is {text!r}, expected NAME=FILE.onnx or NAME=COMMAND")
        methods[name] = of_onnx(Path(what)) if what.endswith(".onnx") else of_command(what)
    return methods


def of_onnx(path: Path) -> Method:
    """The network of an ONNX file that takes two (1, 1, H, W) float32 images in [0, 1]."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("--method FILE.onnx needs: pip install -r requirements-onnx.txt") from None
    if not path.is_file():
        raise UserError(f"--method {path}: no such file")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # a parser of strange bytes may stumble in any way
        raise UserError(f"--method {path}: not an ONNX file ({error})") from None
    names = [tensor.name for tensor in session.get_inputs()]
    if len(names) != 2:
        raise UserError(f"--method {path}: has {len(names)} inputs, expected two images")

    def fuse(luma1: ndarray, luma2: ndarray) -> ndarray:
        feed = dict(zip(names, (luma1[None, None], luma2[None, None]), strict=True))
        return session.run(None, feed)[0].reshape(luma1.shape).clip(0, 1)

    return fuse


def of_command(text: str) -> Method:
    """A command with {1}, {2} and {out} for the sources and the fused image, as PNG files."""
    if not all(name in text for name in ("{1}", "{2}", "{out}")):
        raise UserError(f"--method {text!r}: expected {{1}}, {{2}} and {{out}} in the command")

    def fuse(luma1: ndarray, luma2: ndarray) -> ndarray:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.png" for name in ("1", "2", "out")}
            write_png(files["1"], to_uint8(luma1))
            write_png(files["2"], to_uint8(luma2))
            words = shlex.split(text)
            for name, path in files.items():
                words = [word.replace(f"{{{name}}}", str(path)) for word in words]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not files["out"].is_file():
                last = (done.stderr.strip().splitlines() or ["it wrote no image"])[-1]
                raise UserError(f"--method {text!r} failed: {last}")
            return read_luma8(files["out"]).astype(np.float32) / 255

    return fuse


# --- the table -------------------------------------------------------------------------------


def by_kind(found: list[Planted], task: str, value: str = "share") -> dict[str, ndarray]:
    """A value of the findings by the name of the kind, sorted."""
    names = dict.fromkeys(kind.name(task) for kind in KINDS)
    return {n: np.sort([getattr(p, value) for p in found if p.kind.name(task) == n]) for n in names}


def means_of(kinds: dict[str, ndarray]) -> list[float]:
    """The mean of each kind; NaN of none."""
    return [float(s.mean()) if len(s) else math.nan for s in kinds.values()]


def worst_tenth(shares: ndarray) -> float:
    """The share that a tenth of the findings does not reach; NaN of none."""
    return float(np.quantile(shares, 0.1)) if len(shares) else math.nan


def table_lines(results: dict[str, list[Planted]], task: str) -> list[list[str]]:
    """A title and a line for each method: shares by kind, the worst kind and tenth, d'.

    For a colour task also the worst kind's share of the distance in CIELAB.
    """
    names = list(by_kind([], task))
    lines = [["share kept ↑", *names, "worst kind", "worst tenth", "d'", "worst colour"]]
    for method, found in results.items():
        shares = by_kind(found, task)
        means, tenths = means_of(shares), [worst_tenth(s) for s in shares.values()]
        d_prime = float(np.median([p.d_prime for p in found]))
        colour = np.min(means_of(by_kind(found, task, "colour")))
        cells = *means, np.nanmin(means), np.nanmin(tenths), d_prime, colour
        lines.append([visible(method), *(f"{cell:.2f}" for cell in cells)])
    if all(line[-1] == "nan" for line in lines[1:]):  # grey images
        lines = [line[:-1] for line in lines]
    return lines


def measure_methods(args: MetricArgs) -> None:
    """`metrics.py --findings`: print the table, and write --csv and --plot.

    Raises UserError for another output, before anything is measured.
    """
    files = named_files(args)
    if others := files.keys() - {"csv", "plot"}:
        raise UserError(f"--findings writes --csv and --plot, not --{min(others)}")
    pairs, methods = named_pairs(args)[0], methods_of(args)
    results = {
        name: measure_findings(fuse, pairs, args.seed, name) for name, fuse in methods.items()
    }
    print(f"{args.task}, {args.split}: findings planted into {len(pairs)} pairs")
    print(aligned(table_lines(results, args.task)))
    if args.csv:
        write_bytes(args.csv, to_csv(results, args.task).encode())
    if args.plot:
        suffix = args.plot.suffix.lstrip(".")
        write_bytes(args.plot, plot(results, methods, pairs, args.task, suffix))


def to_csv(results: dict[str, list[Planted]], task: str) -> str:
    """A line for each finding of each method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = "method", "kind", "radius", "pair", "row", "column", "share", "d_prime", "colour"
    writer.writerow(titles)
    for method, found in results.items():
        for p in found:
            cells = p.kind.name(task), p.kind.radius, p.pair, *p.centre
            writer.writerow([method, *cells, p.share, p.d_prime, p.colour])
    return text.getvalue()


def plot(
    results: dict[str, list[Planted]],
    methods: dict[str, Method],
    pairs: list[Pair],
    task: str,
    suffix: str,
) -> bytes:
    """Bars by kind, and a strip of findings of the first method from best to worst."""
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(1, 1.2))
    bars = above.subplots()
    names = list(by_kind([], task))
    for k, found in enumerate(results.values()):
        means = [s.mean() if len(s) else 0 for s in by_kind(found, task).values()]
        bars.bar(np.arange(len(names)) + (k + 0.5) / len(results) * 0.8, means, 0.7 / len(results))
    bars.set_xticks(np.arange(len(names)) + 0.4, names)
    bars.set_ylabel("share of the contrast that is left")
    bars.legend(list(results), loc="center left", bbox_to_anchor=(1, 0.5))
    first = next(iter(results))
    ordered = sorted(results[first], key=lambda p: -p.share)
    shown = [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, 9)]
    panels = below.subplots(3, len(shown))
    below.supylabel("fused       planted source      other source")
    by_name = {pair.name: pair for pair in pairs}
    for column, p in zip(panels.T, shown, strict=True):
        sources = np.stack(read_pair(by_name[p.pair])[:2])
        planted = plant_discs(sources, p.kind, [p.centre])
        images = planted[1 - p.kind.source], planted[p.kind.source], methods[first](*planted)
        rows, columns = (slice(max(0, c - 24), c + 24) for c in p.centre)
        for panel, image in zip(column, images, strict=True):
            panel.imshow(image[rows, columns], cmap="gray", vmin=0, vmax=1)
            panel.set_axis_off()
        column[0].set_title(f"{p.kind.name(task)} {p.share:.2f}", fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, format=suffix, dpi=110)
    return data.getvalue()
