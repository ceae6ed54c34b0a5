"""Rigid registration of two scans of one patient: how far apart they lie, and how to move one.

Six parameters by Mattes mutual information (Mattes et al., IEEE TMI 22, 2003) through SimpleITK, at
8, 4 and 2 mm. At 8 mm the search starts from the scanners' coordinates, the middles of the fields,
the centres of mass and the tops of the heads; from the last two it also starts with turns. The best
result is searched further at 4 mm. So is another result that lies elsewhere, to see whether both
arrive at one place. Each search has one thread, and its sampling has a fixed seed. So the same
volumes give the same transform.

Legend: points are (n, 3) in mm. A matrix is (4, 4), from points of source 1 to those of source 2,
RAS as in grid.py. ITK counts in LPS, and its transforms here go from source 2, whose head is what
is sampled, to source 1.
"""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage
from scipy.spatial.transform import Rotation

from volumes.grid import RAS_LPS, Volume
from volumes.intensity import head
from volumes.transforms import matrix_of

LEVELS = (8.0, 4.0, 2.0)  # mm, about the side of the voxels that are compared
STEPS = {8.0: 4.0, 4.0: 2.0, 2.0: 1.0}  # mm, the longest first step of the optimiser
SHARE = {8.0: 1.0, 4.0: 1.0, 2.0: 0.3}  # of the head's voxels that are sampled
BINS, SEED, ROUNDS = 48, 3407, 150
ARM = 80.0  # mm: a turn counts as much as the way of a point so far from the centre
TURN = 15.0  # degrees, of the turned starts
MARGIN = 4.0  # mm of air around the head that count, too
HU = (-1000, 1000)
MM = (1.0, "mm")
# what is needed to trust a result
AGREE = 3.0  # mm between what two starts arrive at
EQUAL = 0.97  # of the best mutual information: a start that reaches it is as good
SHARP = 1.15  # how many times the mutual information of 15 mm off
SLAB = 60.0  # mm of the head, along each axis
ALIKE = 0.6  # of a head's volume: what the other shows of it, where both fields are
LEAST = 0.05  # nats: less is what noise has
LEAST_SHARED = 0.5  # of the smaller head, in both fields
FARTHEST = 45.0  # degrees


class Registration(NamedTuple):
    """What a registration found, and why it cannot be trusted, if it cannot."""

    matrix: np.ndarray  # (4, 4), RAS mm, from points of source 1 to those of source 2
    centre: np.ndarray  # (3,), RAS mm: of its turn, in source 1
    moved_mm: float  # the mean distance, over the head, by which source 2 moves
    before: float  # mutual information in nats
    after: float
    seconds: float
    doubts: list[str]


class Candidate(NamedTuple):
    """An optimum that a search has found: its mutual information in nats, and its rounds."""

    information: float
    transform: sitk.Euler3DTransform
    rounds: int


class Level(NamedTuple):
    """The two images of a search at one resolution.

    ITK calls the first one fixed and the second one moving. Here source 2 is the first, although in
    the result it is the one that moves.
    """

    sampled: sitk.Image  # its voxels are compared
    interpolated: sitk.Image  # its values are looked up where the transform leads
    mask: sitk.Image  # the voxels of the first that count
    mm: float


# --- the two ways in -------------------------------------------------------------------------


def rigid(source1: Volume, source2: Volume, kind: str) -> Registration:
    """The best rigid transform between two volumes.

    Args:
        kind: CT, PET, SPECT or MRI, of source 1; source 2 is an MRI.
    """
    began = time.perf_counter()
    levels = pyramid(source1, source2, kind, LEVELS)
    points, others = heads(levels[1])
    if not (len(points) and len(others)):
        return nothing(began, "one of them shows no head")
    found = optima(levels[0], starts(levels[0], points, others))
    found = [c for c in found if shared_head(c.transform, levels[1], points, others) >= 0.3]
    if not found:
        return nothing(began, "no start brought one head over the other")
    best, *rest = ranked(found)
    second = next((c for c in rest if apart(c.transform, best.transform, points) > AGREE), None)
    nudged = best.transform if second is None else second.transform
    if second is None:
        nudged = shifted(best.transform, (5.0, -5.0, 5.0), (5.0, 5.0, -5.0))
    finer = optima(levels[1], [best.transform, nudged])
    if not finer:
        return nothing(began, "the finer search failed")
    best = ranked(finer)[0]
    doubts = disagreement(best, finer, points)
    last = optima(levels[2], [best.transform])
    best = last[0] if last else best
    doubts += incomplete(best.transform, levels[1], kind)
    return judged(best, levels[1], points, others, doubts, began)


def check(source1: Volume, source2: Volume, kind: str) -> Registration:
    """A rough registration of volumes that should lie on each other; it starts from there."""
    began = time.perf_counter()
    levels = pyramid(source1, source2, kind, LEVELS[:2])
    points, others = heads(levels[1])
    if not (len(points) and len(others)):
        return nothing(began, "one of them shows no head")
    transform = turned(points.mean(0))
    for level in levels:
        found = optima(level, [transform])
        if not found:
            return nothing(began, "they do not overlap")
        transform = found[0].transform
    doubts = incomplete(found[0].transform, levels[1], kind)
    return judged(found[0], levels[1], points, others, doubts, began)


def assess(source1: Volume, source2: Volume, kind: str, matrix: np.ndarray) -> Registration:
    """A matrix that came from elsewhere, measured like one of ours; it is never in doubt."""
    began = time.perf_counter()
    level = pyramid(source1, source2, kind, LEVELS[1:2])[0]
    points, _ = heads(level)
    if not len(points):
        return nothing(began, "img2 shows no head")._replace(matrix=matrix, doubts=[])
    lps = np.linalg.inv(RAS_LPS @ matrix @ RAS_LPS)
    transform = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    return result(level, transform, points, [], began)


# --- images ----------------------------------------------------------------------------------


def image_of(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """An ITK image of (I, J, K) voxels; the values are copied."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = RAS_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def pyramid(source1: Volume, source2: Volume, kind: str, levels: Iterable[float]) -> list[Level]:
    """Both volumes at each resolution; they are shrunk by means, so nothing aliases."""
    finest = [shrunk(image_of(v.data, v.affine), LEVELS[-1]) for v in (source1, source2)]
    image1, image2 = (clipped(i, k) for i, k in zip(finest, (kind, "MRI"), strict=True))
    pairs = [(shrunk(image2, mm), shrunk(image1, mm), mm) for mm in levels]
    rough = shrunk(image2, 4.0)
    inside = head(sitk.GetArrayViewFromImage(rough))
    away = ndimage.distance_transform_edt(~inside, rough.GetSpacing()[::-1])
    mask = sitk.GetImageFromArray((inside.any() & (away <= MARGIN)).astype(np.uint8))
    mask.CopyInformation(rough)
    nearest = sitk.sitkNearestNeighbor
    return [
        Level(two, one, sitk.Resample(mask, two, sitk.Transform(), nearest), mm)
        for two, one, mm in pairs
    ]


def shrunk(image: sitk.Image, mm: float) -> sitk.Image:
    """The image in voxels of about `mm` where they were finer, at least four along each axis."""
    sides = zip(image.GetSpacing(), image.GetSize(), strict=True)
    factors = [max(1, min(round(mm / spacing), size // 4)) for spacing, size in sides]
    return sitk.BinShrink(image, factors) if max(factors) > 1 else image


def clipped(image: sitk.Image, kind: str) -> sitk.Image:
    """The image without the outliers that would take most of the bins of a histogram."""
    values = sitk.GetArrayViewFromImage(image)
    low, high = HU if kind == "CT" else np.percentile(values, (0.1, 99.9))
    return sitk.Clamp(image, sitk.sitkFloat32, float(low), float(max(high, low)))


def heads(level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3), LPS mm, all over the head of source 2, and over that of source 1."""
    masks = (
        sitk.GetArrayViewFromImage(level.mask),
        head(sitk.GetArrayViewFromImage(level.interpolated)),
    )
    return tuple(
        physical(image, np.argwhere(mask)[:, ::-1])
        for image, mask in zip((level.sampled, level.interpolated), masks, strict=True)
    )


def physical(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Points (n, 3), LPS mm, of voxels (n, 3), x first."""
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return index @ axes.T + image.GetOrigin()


# --- transforms ------------------------------------------------------------------------------


def turned(centre: np.ndarray, turn: Iterable[float] = (0, 0, 0), shift=(0, 0, 0)):
    """ITK's transform of a turn (three angles in degrees) about a centre, then a shift in mm."""
    transform = sitk.Euler3DTransform()
    transform.SetCenter([float(c) for c in centre])
    transform.SetRotation(*np.radians(turn).tolist())
    transform.SetTranslation([float(s) for s in shift])
    return transform


def shifted(transform: sitk.Euler3DTransform, turn: Iterable[float], shift: Iterable[float]):
    """The transform, turned by three angles in degrees and shifted by mm."""
    angles = np.degrees(transform.GetParameters()[:3]) + turn
    return turned(transform.GetCenter(), angles, np.add(transform.GetTranslation(), shift))


def moved_by(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (n, d) after a matrix (d + 1, d + 1)."""
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def apart(a: sitk.Transform, b: sitk.Transform, points: np.ndarray) -> float:
    """The mean distance, in mm, of where two transforms put points."""
    ends = (moved_by(points, matrix_of(t)) for t in (a, b))
    return float(np.linalg.norm(np.subtract(*ends), axis=1).mean())


def shared_head(transform: sitk.Transform, level: Level, points, others) -> float:
    """The share of the smaller of both heads that lies in both fields."""
    inside = landing(points, transform, level.interpolated).sum()
    ratio = np.prod(level.interpolated.GetSpacing()) / np.prod(level.sampled.GetSpacing())
    return float(min(1, inside / min(len(points), len(others) * ratio)))


def landing(points: np.ndarray, transform: sitk.Transform, image: sitk.Image) -> np.ndarray:
    """Which points (n, 3) a transform puts into an image's field, (n,) bool."""
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    there = moved_by(points, matrix_of(transform)) - image.GetOrigin()
    index = there @ np.linalg.inv(axes).T
    return ((index >= -0.5) & (index <= np.array(image.GetSize()) - 0.5)).all(1)


# --- the search ------------------------------------------------------------------------------


def starts(level: Level, points: np.ndarray, others: np.ndarray) -> list[sitk.Euler3DTransform]:
    """Where the search begins, see the head of this file."""
    middles = [
        physical(i, (np.array(i.GetSize()) - 1) / 2) for i in (level.sampled, level.interpolated)
    ]
    centre = points.mean(0)
    shifts = [others.mean(0) - centre, top(others) - top(points)]
    turns = [np.zeros(3), *(sign * TURN * axis for axis in np.eye(3) for sign in (1, -1))]
    plain = [np.zeros(3), middles[1] - middles[0]]
    return [turned(centre, (0, 0, 0), s) for s in plain] + [
        turned(centre, turn, s) for s in shifts for turn in turns
    ]


def top(points: np.ndarray) -> np.ndarray:
    """The middle of a head's uppermost 120 mm, so that a neck or body below does not count."""
    return points[points[:, 2] > points[:, 2].max() - 120].mean(0)


def method(level: Level) -> sitk.ImageRegistrationMethod:
    """Mattes mutual information over the head of source 2, in one thread."""
    search = sitk.ImageRegistrationMethod()
    search.SetNumberOfThreads(1)
    search.SetNumberOfWorkUnits(1)  # the order of sums is then always the same
    search.SetMetricAsMattesMutualInformation(BINS)
    search.SetMetricFixedMask(level.mask)
    search.SetInterpolator(sitk.sitkLinear)
    return search


def optimised(level: Level, start: sitk.Transform) -> Candidate | None:
    """The nearest optimum from a start; None where too little of the volumes overlaps."""
    search, transform = method(level), type(start)(start)
    if SHARE[level.mm] < 1:
        search.SetMetricSamplingStrategy(search.RANDOM)
        search.SetMetricSamplingPercentage(SHARE[level.mm], SEED)
    step = STEPS[level.mm]
    search.SetOptimizerAsRegularStepGradientDescent(step, step / 1000, ROUNDS, 0.6, 1e-6)
    n = level.sampled.GetDimension()
    scales = {2: [ARM**2, 1, 1], 3: [ARM**2] * 3 + [1] * 3}[n]
    if start.GetNumberOfParameters() > len(scales):  # a similarity: its scale comes first
        scales = [ARM**2, *scales]
    search.SetOptimizerScales(scales)
    search.SetInitialTransform(transform, True)
    try:
        search.Execute(level.sampled, level.interpolated)
    except RuntimeError:  # no samples in common
        return None
    return Candidate(-search.GetMetricValue(), transform, search.GetOptimizerIteration())


def optima(level: Level, begin: list[sitk.Transform]) -> list[Candidate]:
    """The optimum from each start, in their order, without those that failed; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [c for c in pool.map(lambda start: optimised(level, start), begin) if c]


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """By mutual information, the best first."""
    return sorted(candidates, key=lambda c: -c.information)


def information(level: Level, transform: sitk.Transform) -> float:
    """Mutual information in nats of a transform; 0 where nothing overlaps."""
    search = method(level)
    search.SetInitialTransform(transform)
    try:
        return max(0.0, -search.MetricEvaluate(level.sampled, level.interpolated))
    except RuntimeError:
        return 0.0


# --- what to think of it ---------------------------------------------------------------------


def disagreement(
    best: Candidate, others: list[Candidate], points: np.ndarray, unit: tuple[float, str] = MM
) -> list[str]:
    """The doubt that other starts arrive elsewhere, and are as good there.

    `unit` is the length in mm that the user counts in, and its name.
    """
    length, name = unit
    good = [c for c in others if c.information >= EQUAL * best.information]
    far = max((apart(c.transform, best.transform, points) for c in good), default=0)
    if far <= AGREE:
        return []
    return [
        f"its starts disagree by {far / length:.1f} {name}, expected at most {AGREE / length:.3g}"
    ]


def incomplete(transform: sitk.Transform, level: Level, kind: str) -> list[str]:
    """Doubts that too little of the head is in both, seen where both fields are.

    A slab of it can be moved by some mm and fits as well. So can a brain without its skull beside a
    whole head; PET and SPECT show the brain alone in any case.
    """
    litres, thickness = [], []
    back = transform.GetInverse()
    for image, field, way in (
        (level.sampled, level.interpolated, transform),
        (level.interpolated, level.sampled, back),
    ):
        points = physical(image, np.argwhere(head(sitk.GetArrayViewFromImage(image)))[:, ::-1])
        points = points[landing(points, way, field)]
        litres.append(len(points) * float(np.prod(image.GetSpacing())) / 1e6)
        if len(points):
            along = points @ np.reshape(image.GetDirection(), (3, 3))
            thickness.append(float((np.ptp(along, axis=0) + image.GetSpacing()).min()))
    doubts = []
    if min(thickness, default=0) < SLAB:
        found = min(thickness, default=0)
        doubts.append(f"only {found:.0f} mm of the head are in both, expected {SLAB:g}")
    if kind == "CT" and min(litres) < ALIKE * max(litres):
        doubts.append(
            f"img1 shows {litres[1]:.1f} l of a head and img2 {litres[0]:.1f} l of it: has one no "
            "skull? Give both with it, or both without"
        )
    return doubts


def judged(best: Candidate, level: Level, points, others, doubts: list[str], began: float):
    """The registration of the best candidate, with all doubts about it."""
    transform, doubts = best.transform, list(doubts)
    found = matrix_of(transform)
    angle = np.degrees(Rotation.from_matrix(found[:3, :3]).magnitude())
    if angle > FARTHEST:
        doubts.append(f"it turns by {angle:.0f} degrees, expected at most {FARTHEST:g}")
    if best.rounds >= ROUNDS:
        doubts.append("the optimiser did not come to rest")
    share = shared_head(transform, level, points, others)
    if share < LEAST_SHARED:
        doubts.append(f"only {share:.0%} of the smaller head would be in both, expected half")
    after = information(level, transform)
    off = [information(level, shifted(transform, (0, 0, 0), s)) for s in away(15.0)]
    if after < max(SHARP * max(off), LEAST):
        doubts.append("its mutual information is hardly better than 15 mm off")
    return result(level, transform, points, doubts, began)


def result(level: Level, transform: sitk.Transform, points, doubts: list[str], began: float):
    """The registration of a transform, measured over the head of source 2."""
    found = matrix_of(transform)
    ends = moved_by(points, found)
    return Registration(
        matrix=np.linalg.inv(RAS_LPS @ found @ RAS_LPS),
        centre=RAS_LPS[:3, :3] @ ends.mean(0),
        moved_mm=float(np.linalg.norm(ends - points, axis=1).mean()),
        before=information(level, sitk.Transform(3, sitk.sitkIdentity)),
        after=information(level, transform),
        seconds=time.perf_counter() - began,
        doubts=doubts,
    )


def away(mm: float) -> np.ndarray:
    """Six shifts of that length."""
    return np.concatenate([np.eye(3), -np.eye(3)]) * mm


def nothing(began: float, doubt: str) -> Registration:
    """A registration that found nothing."""
    seconds = time.perf_counter() - began
    return Registration(np.eye(4), np.zeros(3), 0.0, 0.0, 0.0, seconds, [doubt])
