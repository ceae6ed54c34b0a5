"""What a fusion keeps of a finding that is planted into one source.

A soft disc is planted into one source, inside of the head. It is brighter or darker by a quarter of
the range. The pair is fused without it and with it. The contrast of the disc is its mean less the
mean of the ring around it. What counts is how the disc changed that contrast:

    share = change of contrast in the fused image / change of contrast in the source

At 1 the finding is as it was, at 0 it is lost, and below 0 it is inverted. More than 1 counts as 1:
gain is no merit. d' is the change of contrast over the standard deviation of the ring without the
finding. It says how far the finding stands out from what lies around it.

    visible = d' in the fused image / d' in the source

A gain of the fused image does not change this value. It also counts up to 1. In a colour image the
contrast is also measured as a distance in CIELAB. docs/metrics.md has every constant.

Positions follow from the seed and the name of the pair, so they are the same for every method. The
method must be one that can be run: a function of two lumas, see evaluation/methods.py. A folder of
fused images is judged by evaluation/one_source.py: by what only one source shows in real images.

Legend: lumas are (H, W) float32 in [0, 1].
"""

import csv
import io
import math
from dataclasses import astuple, dataclass

import numpy as np
from numpy import ndarray
from scipy import ndimage
from skimage.color import rgb2lab
from tqdm import tqdm

from args_setting import TASKS
from cli import UserError, visible
from dataset import Pair, read_pair
from evaluation.compare import interval, resampled_means
from evaluation.methods import Method
from images import to_uint8
from phantom import seed_of

CONTRAST = 0.25  # of the range
RADII = (3, 6)  # of the discs, pixels
DISCS = 4  # planted together into a source, far apart
APART = 40  # pixels between the centres of discs, at least
GAP, RING = 2, 5  # pixels between a disc and its ring, and the width of the ring
HEAD, RIM = 0.05, 20  # the head is where a source is brighter; pixels of scalp and skull around it
WORST_OF = ("visible", "colour")  # values whose worst kind a table shows
TITLES = {"visible": "visible, worst kind", "colour": "worst colour"}
ROOM = 0.8  # share of the contrast that must fit between the source's value and black or white


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
    share: float  # of the contrast, at most 1
    visible: float  # share of d', at most 1
    d_prime: float  # in the fused image
    colour: float  # share of the distance in CIELAB, at most 1; NaN of grey images


@dataclass(frozen=True)
class Slice:
    """A pair without findings, and what a method makes of it."""

    name: str
    sources: ndarray  # (2, H, W)
    chroma: ndarray | None  # (H, W, 3) of the first source
    inside: ndarray  # (H, W) bool, the pixels inside of the skull
    fused: ndarray  # (H, W)


def measure_findings(method: Method, pairs: list[Pair], seed: int, title: str) -> list[Planted]:
    """Plant findings of every kind into every pair and measure what the method keeps of them.

    Raises UserError if no pair has a place for any.
    """
    found = []
    for pair in tqdm(pairs, title, unit="pair", leave=False, disable=None):
        *sources, chroma = read_pair(pair)
        sources = np.stack(sources)  # (2, H, W)
        fused = stored(method(*sources))
        slice_ = Slice(pair.name, sources, chroma, inside_of(sources), fused)
        for kind in KINDS:
            found += measure_kind(method, slice_, kind, seed)
    if not found:
        raise UserError(
            f"no finding fits into the {len(pairs)} pairs: a disc needs room inside of the skull, "
            f"more than {RIM} pixels from the edge of the head; expected larger images, of whole "
            "heads"
        )
    return found


def measure_kind(method: Method, slice_: Slice, kind: Kind, seed: int) -> list[Planted]:
    """Plant all findings of a kind into a slice at once, and measure each."""
    sources, fused, chroma = slice_.sources, slice_.fused, slice_.chroma
    centres = positions(sources, slice_.inside, kind, seed_of(seed, slice_.name, *astuple(kind)))
    if not centres:
        return []
    planted = plant_discs(sources, kind, centres)
    source, planted_source = sources[kind.source], planted[kind.source]
    fused_planted = stored(method(*planted))
    change, response = planted_source - source, fused_planted - fused
    coloured = None
    if chroma is not None:
        own = chroma if kind.source == 0 else np.zeros((1, 1, 3), np.float32)  # the MRI is grey
        coloured = [(to_uint8(planted_source, own), to_uint8(source, own))]
        coloured += [(to_uint8(fused_planted, chroma), to_uint8(fused, chroma))]
    found = []
    for centre in centres:
        disc, ring = regions(fused.shape, centre, kind.radius)
        kept, given = contrast(response, disc, ring), contrast(change, disc, ring)
        d_prime, d_prime_source = kept / noise(fused, ring), given / noise(source, ring)
        colour = math.nan
        if coloured is not None:
            before, after = (distance(*images, disc, ring) for images in coloured)
            colour = at_most_one(after / before)
        found.append(
            Planted(
                kind,
                slice_.name,
                centre,
                at_most_one(kept / given),
                at_most_one(d_prime / d_prime_source),
                float(kind.sign * d_prime),
                colour,
            )
        )
    return found


def at_most_one(share: float) -> float:
    """A share, where gain is no merit."""
    return min(float(share), 1.0)


def noise(image: ndarray, ring: ndarray) -> float:
    """Standard deviation in the ring, at least one grey level."""
    return max(float(image[ring].std()), 1 / 255)


def contrast(image: ndarray, disc: ndarray, ring: ndarray) -> float:
    """The mean of (H, W) in the disc, less that in the ring."""
    return image[disc].mean() - image[ring].mean()


def distance(planted: ndarray, before: ndarray, disc: ndarray, ring: ndarray) -> float:
    """How far a finding moves the contrast of disc and ring in CIELAB (D65).

    The images with and without it are RGB (H, W, 3), uint8.
    """
    with_it, without = (
        rgb2lab(image[disc]).mean(0) - rgb2lab(image[ring]).mean(0) for image in (planted, before)
    )
    return float(np.linalg.norm(with_it - without))


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
        share = soft_disc(sources.shape[1:], centre, kind.radius)
        planted[kind.source] += kind.sign * CONTRAST * share
    return planted.clip(0, 1)


def soft_disc(sides: tuple[int, int], centre: tuple[float, float], radius: float) -> ndarray:
    """The share that a disc has of each pixel, (H, W) float32 in [0, 1]; its edge is soft.

    Args:
        sides: height and width of the image, in pixels.
        centre: row and column, in pixels.
        radius: in pixels.
    """
    y, x = np.ogrid[: sides[0], : sides[1]]
    y, x = y - np.float32(centre[0]), x - np.float32(centre[1])
    share = np.clip((radius - np.hypot(x, y)) / 2 + 0.5, 0, 1)  # falls over two pixels
    return share.astype(np.float32)


def regions(
    shape: tuple[int, int], centre: tuple[int, int], radius: int
) -> tuple[ndarray, ndarray]:
    """The pixels (H, W) of a disc, and of the ring around it."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot(y - centre[0], x - centre[1])
    inner = radius + GAP
    return distance <= radius, (distance > inner) & (distance <= inner + RING)


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


def summary(found: list[Planted], task: str, people: dict[str, str], seed: int) -> dict[str, float]:
    """What a table says of a method: the share of each kind, and the worst of several values.

    `people` has the person of each pair, for the interval of the worst kind. NaN where there is no
    value.
    """
    shares = by_kind(found, task)
    means = means_of(shares)
    low, high = worst_kind_interval(found, task, people, seed)
    worst = {name: np.fmin.reduce(means_of(by_kind(found, task, name))) for name in WORST_OF}
    return dict(zip(shares, means, strict=True)) | {
        "worst kind": float(np.fmin.reduce(means)),
        "low": low,
        "high": high,
        "worst tenth": float(np.fmin.reduce([worst_tenth(s) for s in shares.values()])),
        "visible": float(worst["visible"]),
        "d'": float(np.median([p.d_prime for p in found])),
        "colour": float(worst["colour"]),
    }


def table_lines(summaries: dict[str, dict[str, float]]) -> list[list[str]]:
    """A title and a line for each method, from its `summary`.

    A value that no method has is left out, as colour of grey images.
    """
    first = next(iter(summaries.values()))
    names = [name for name in first if name not in ("low", "high")]
    lines = [["share kept ↑", *(TITLES.get(name, name) for name in names)]]
    for method, values in summaries.items():
        lines.append([visible(method), *(two_digits(values[name]) for name in names)])
    limits = [(values["low"], values["high"]) for values in summaries.values()]
    cells = ["" if math.isnan(low) else f"{low:.2f} .. {high:.2f}" for low, high in limits]
    at = names.index("worst kind") + 2
    for line, cell in zip(lines, ["95 % interval", *cells], strict=True):
        line.insert(at, cell)
    used = [k for k in range(len(lines[0])) if any(line[k] for line in lines[1:])]
    return [[line[k] for k in used] for line in lines]


def worst_kind_interval(
    found: list[Planted], task: str, people: dict[str, str], seed: int
) -> tuple[float, float]:
    """The 95 % interval over people of the worst kind's mean share; NaN twice of one person."""
    names = list(by_kind([], task))
    values = np.full((len(found), len(names)), np.nan)
    for row, planted in zip(values, found, strict=True):
        row[names.index(planted.kind.name(task))] = planted.share
    drawn = resampled_means(values, [people[planted.pair] for planted in found], seed)
    return interval(np.fmin.reduce(drawn, axis=1))  # fmin leaves NaN out


def two_digits(value: float) -> str:
    """A value for the table; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.2f}"


def to_csv(results: dict[str, list[Planted]], task: str) -> str:
    """A line for each finding of each method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    values = "share", "visible", "d_prime", "colour"
    writer.writerow(["method", "kind", "radius", "pair", "row", "column", *values])
    for method, found in results.items():
        for p in found:
            cells = p.kind.name(task), p.kind.radius, p.pair, *p.centre
            numbers = (getattr(p, value) for value in values)
            writer.writerow([method, *cells, *("" if math.isnan(n) else n for n in numbers)])
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
