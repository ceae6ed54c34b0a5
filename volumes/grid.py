"""A volume and its grid: where voxels lie in the patient, resampling, and slices to look at.

Sources: affines and space codes as in the NIfTI-1 header (nifti1.h: sform, qform); axis orders
through nibabel's orientations; linear resampling through SimpleITK; the low-pass before a coarser
grid through scipy, a Gaussian as wide at half its height as the new voxels.

Legend: I J K voxels of a volume as stored. An affine is (4, 4), from a voxel index (i, j, k, 1) to
millimetres in RAS+: x grows to the patient's right, y to anterior, z to superior, as in NIfTI.
DICOM and ITK count in LPS+, where x and y change their sign. An array of SimpleITK is (K, J, I).
N slices of (H, W) pixels are as a reader looks at them: the patient's left is on the right,
anterior or superior on top.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nibabel import orientations
from scipy import ndimage

import limits
from cli import UserError

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
SCANNER = 1  # NIfTI code: coordinates of the scanner
SPACES = {1: "the scanner's", 2: "another scan's", 3: "Talairach", 4: "MNI152", 5: "a template's"}
STANDARD = (3, 4, 5)  # spaces of a template, never a patient's own
REGISTER = "--register rigid moves img2 onto img1"
NEAR = 0.01  # of a voxel: positions closer than this are the same
SHEAR = 0.1  # of a voxel: how far a voxel may lie from where orthogonal axes would put it
AXES = ("sagittal", "coronal", "axial")  # the axes L, P, S of a patient
GRIDS = ("auto", "1", "2")  # what --grid takes beside a side in mm
FWHM = 2 * np.sqrt(2 * np.log(2))  # width at half height of a Gaussian, in its sigma


@dataclass
class Volume:
    """A volume and where it is. `notes` are lines for the user, without anything of the patient."""

    data: np.ndarray  # (I, J, K) float32
    affine: np.ndarray  # (4, 4), RAS mm
    code: int = SCANNER  # NIfTI code of its space
    placed: bool = True  # False: the file does not say where it is
    frame_of_reference: str | None = None  # DICOM's UID of it
    modality: str | None = None  # DICOM's: CT, MR, PT or NM
    suv: float | None = None  # body-weight SUV of a value of 1
    no_suv: str = "the file has no DICOM fields"  # why `suv` is None
    unit: str = ""  # of the values, where DICOM tells it: SUV, Bq/ml or counts
    summed: bool = False  # concentrations of several times, added up
    patient: tuple[str, ...] | None = field(default=None, repr=False)  # to be compared only
    origin: Path | None = None  # a DICOM file of it
    planes: list = field(default_factory=list, repr=False)  # of DICOM: the Plane of each image
    files: list[Path] = field(default_factory=list, repr=False)  # that its reader opened
    notes: list[str] = field(default_factory=list)
    chosen_by: set[str] = field(default_factory=set)  # flags that had an effect on what was read

    @property
    def spacing(self) -> np.ndarray:
        """Distance of neighbouring voxels along I, J and K, in mm: (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def describe(self) -> str:
        """Size in voxels and mm."""
        sides = "x".join(map(str, self.data.shape))
        return f"{sides} voxels of {'x'.join(f'{s:.3g}' for s in self.spacing)} mm"


# --- two grids -------------------------------------------------------------------------------


def displacement(shape: tuple[int, ...], affine1: np.ndarray, affine2: np.ndarray) -> float:
    """The largest distance, in mm, between where two affines put one voxel of a grid."""
    corners = np.array([(*c, 1) for c in np.ndindex(2, 2, 2)]) * (*(np.array(shape) - 1), 1)
    return float(np.linalg.norm((corners @ (affine1 - affine2).T)[:, :3], axis=1).max())


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes have their voxels at the same positions, in the same order."""
    if a.data.shape != b.data.shape:
        return False
    return displacement(a.data.shape, a.affine, b.affine) < NEAR * a.spacing.min()


def reordered(volume: Volume, affine: np.ndarray) -> Volume:
    """The same voxels, axes permuted and flipped to run as nearly as they can along `affine`'s."""
    ornt = orientations.ornt_transform(
        orientations.io_orientation(volume.affine), orientations.io_orientation(affine)
    )
    data = orientations.apply_orientation(volume.data, ornt)
    turned = volume.affine @ orientations.inv_ornt_aff(ornt, volume.data.shape)
    return replace(volume, data=data, affine=turned)


def same_voxels(a: Volume, b: Volume) -> bool:
    """Whether two volumes have their voxels at the same positions, in any order."""
    return same_grid(a, reordered(b, a.affine))


def coverage(grid: Volume, volume: Volume) -> float:
    """The share of `grid`'s field that `volume`'s field covers, on about 40 points an axis."""
    shape = np.array(grid.data.shape)
    counts = np.minimum(shape, 40)
    points = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(counts, shape, strict=True)]
    places = np.stack([*np.meshgrid(*points, indexing="ij"), np.ones(counts)])
    to_volume = np.linalg.inv(volume.affine) @ grid.affine
    index = np.tensordot(to_volume[:3], places, 1)  # (3, …) in the volume's voxels
    last = np.array(volume.data.shape)[:, None, None, None] - 0.5
    return float(((index >= -0.5 - NEAR) & (index <= last + NEAR)).all(0).mean())


def common(a: Volume, b: Volume) -> float:
    """The share of the smaller field, of two, that the other one covers."""
    sizes = [abs(np.linalg.det(v.affine[:3, :3])) * np.prod(v.data.shape) for v in (a, b)]
    return coverage(a, b) if sizes[0] <= sizes[1] else coverage(b, a)


def low_passed(moving: Volume, affine: np.ndarray) -> Volume:
    """`moving` after a low-pass along each of its axes on which the new grid is coarser.

    Without it, stripes finer than the new voxels would show as other stripes. UserError for a step
    so long that the low-pass would take minutes.
    """
    axes = moving.affine[:3, :3] / moving.spacing
    step = np.linalg.norm(axes.T @ affine[:3, :3], axis=1) / moving.spacing  # in moving's voxels
    step[np.array(moving.data.shape) == 1] = 1
    limits.check_coarser(moving.spacing, float(step.max()))
    sigma = np.sqrt(np.maximum(step**2 - 1, 0)) / FWHM
    sigma[step < 1.1] = 0
    if not sigma.any():
        return moving
    return replace(moving, data=ndimage.gaussian_filter(moving.data, sigma, mode="nearest"))


def set_place(image: sitk.Image, affine: np.ndarray) -> None:
    """Tell an ITK image where it lies, by a RAS affine."""
    lps = RAS_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())


def resample(moving: Volume, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """`moving` on another grid, (I, J, K) float32: linear; its minimum where it has no voxel.

    UserError for a grid of more voxels than a volume may have.
    """
    way = "give one of the two sources as the grid (--grid 1 or 2)"
    limits.check_grid("the grid would have", shape, way, limits.VOXELS)
    source = sitk.GetImageFromArray(moving.data.T)
    grid = sitk.Image([int(n) for n in shape], sitk.sitkUInt8)
    set_place(source, moving.affine)
    set_place(grid, affine)
    fill = float(moving.data.min())
    moved = sitk.Resample(source, grid, sitk.Transform(), sitk.sitkLinear, fill, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(moved).T


def straightened(volume: Volume) -> Volume:
    """The volume itself, or resampled to right angles if its axes are sheared, as by a gantry tilt.

    A sheared grid has no qform, and ITK's viewers would show it elsewhere. UserError for a shear
    so strong that the new grid would be far larger than the volume.
    """
    columns, spacing = volume.affine[:3, :3], volume.spacing
    if displacement(volume.data.shape, volume.affine, _orthogonal(volume)) <= SHEAR * spacing.min():
        return volume
    axes, r = np.linalg.qr(columns)  # the in-plane axes stay, the third becomes their normal
    axes, r = axes * np.sign(np.diag(r)), r * np.sign(np.diag(r))[:, None]
    step = np.abs(np.diag(r))  # mm, (3,)
    edges = np.array(list(np.ndindex(2, 2, 2))) * volume.data.shape - 0.5
    along = edges @ columns.T @ axes  # mm along each new axis, from voxel 0
    low = np.round(along.min(0) / step, 6) + 0.5
    size = [int(n) for n in np.ceil(np.round(along.max(0) / step - low + 0.5, 6))]
    way = "mend its affine, or resample it"
    most = max(limits.GRID_VOXELS, 2 * volume.data.size)
    limits.check_grid("its axes are sheared; at right angles it would have", size, way, most)
    affine = np.eye(4)
    affine[:3, :3] = axes * step
    affine[:3, 3] = volume.affine[:3, 3] + axes @ (low * step)
    tilt = np.degrees(np.arccos(np.clip(step[2] / spacing[2], -1, 1)))
    note = f"sheared axes (tilt {tilt:.1f} degrees), resampled to right angles"
    data = resample(volume, tuple(size), affine)
    return replace(volume, data=data, affine=affine, notes=[*volume.notes, note])


def _orthogonal(volume: Volume) -> np.ndarray:
    """The affine of the nearest orthogonal axes with the volume's spacing, about its middle."""
    u, _, v = np.linalg.svd(volume.affine[:3, :3] / volume.spacing)
    affine = volume.affine.copy()
    affine[:3, :3] = u @ v * volume.spacing
    middle = np.append((np.array(volume.data.shape) - 1) / 2, 1)
    affine[:3, 3] += ((volume.affine - affine) @ middle)[:3]
    return affine


def passed_over(doubts: list[tuple[str, str]], forced: Collection[str]) -> list[str]:
    """Lines for the doubts that are forced; UserError for doubts that are not.

    A doubt is a pair: what to force, and a line.
    """
    left = dict.fromkeys(what for what, _ in doubts if what not in forced)
    if left:
        lines = "; ".join(line for what, line in doubts if what in left)
        raise UserError(f"{lines}; --force {','.join(left)} fuses all the same")
    return [f"forced ({what}): {line}" for what, line in doubts]


def place_doubts(source1: Volume, source2: Volume) -> list[tuple[str, str]]:
    """What is in doubt about volumes that do not say where they are, for `passed_over`.

    A registration does not help: left and right would be in doubt.
    """
    line = "does not say where it is in the patient (no sform, qform, space or position)"
    pairs = (("img1", source1), ("img2", source2))
    return [("place", f"{name} {line}") for name, volume in pairs if not volume.placed]


def space_doubts(source1: Volume, source2: Volume) -> list[tuple[str, str]]:
    """What is in doubt about two volumes being in one patient space, for `passed_over`."""
    doubts = []
    spaces = {v.code for v in (source1, source2)}
    if len(spaces) == 2 and spaces & set(STANDARD):
        first, second = (SPACES.get(v.code, "unknown") for v in (source1, source2))
        doubts.append(("space", f"img1 is in {first} space, img2 in {second} space, {REGISTER}"))
    frames = source1.frame_of_reference, source2.frame_of_reference
    if all(frames) and frames[0] != frames[1]:
        line = f"img1 and img2 have different DICOM frames of reference, {REGISTER}"
        doubts.append(("space", line))
    return doubts


def field_doubts(source1: Volume, source2: Volume, registered: bool) -> list[tuple[str, str]]:
    """What is in doubt about two volumes showing one part of the body, for `passed_over`."""
    share = common(source1, source2)
    if share >= 0.5:
        return []
    line = f"img1 and img2 share only {share:.0%} of the smaller field, expected half"
    return [("overlap", line if registered else f"{line}, {REGISTER}")]


# --- the grid of the output ------------------------------------------------------------------


def in_plane(spacing: np.ndarray) -> float:
    """The side of a pixel, in mm, of the finest slices; `spacing` is that of the voxels."""
    return float(np.sqrt(np.prod(np.sort(spacing)[:2])))


def finer_source(spacing1: np.ndarray, spacing2: np.ndarray) -> int:
    """1 or 2: the source with the finer pixels; 1 if they are nearly equal."""
    return 2 if in_plane(spacing2) < 0.99 * in_plane(spacing1) else 1


def pick_grid(source1: Volume, source2: Volume, kind: str, grid: str) -> tuple[int, Volume]:
    """Which source has the grid of the output, 1 or 2, and that grid; its values do not count.

    Args:
        kind: CT, PET or SPECT, of source 1; source 2 is an MRI.
        grid: auto, 1, 2 or the side of cubic voxels in mm. "auto" is the MRI's for PET and SPECT,
            and for CT that with the finer pixels, source 1's if they are nearly equal.

    Raises:
        UserError: `grid` is anything else, or would have too many voxels.
    """
    if grid in ("1", "2"):
        number = int(grid)
    elif kind == "CT":
        number = finer_source(source1.spacing, source2.spacing)
    else:
        number = 2
    chosen = straightened((source1, source2)[number - 1])
    if grid in GRIDS:
        return number, chosen
    try:
        mm = float(grid.lower().removesuffix("mm"))
    except ValueError:
        mm = 0.0
    if not 0 < mm < np.inf:
        raise UserError(f"--grid is {grid!r}, expected auto, 1, 2, or a side of voxels in mm")
    return number, cubic(chosen, mm)


def cubic(volume: Volume, mm: float) -> Volume:
    """The field of a volume in voxels of `mm` each way, about the same middle; without values.

    UserError for too many voxels.
    """
    extent = np.array(volume.data.shape) * volume.spacing
    shape = [max(int(n), 1) for n in np.rint(extent / mm)]
    enough = float(np.cbrt(extent.prod() / limits.GRID_VOXELS))
    way = f"--grid {1.1 * enough:.2g} is possible, or the scan's own voxels (auto; here: full)"
    limits.check_grid(f"a grid of {mm:g} mm would have", shape, way)
    shape = np.array(shape)
    affine = volume.affine.copy()
    affine[:3, :3] *= mm / volume.spacing
    middle = volume.affine[:3] @ np.append((np.array(volume.data.shape) - 1) / 2, 1)
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    data = np.broadcast_to(np.float32(0), tuple(shape))
    return replace(volume, data=data, affine=affine, notes=[])


class Gridded(NamedTuple):
    """A volume on the voxels of a grid, and what was done to it."""

    data: np.ndarray  # (I, J, K) float32
    resampled: bool  # False: its voxels lay there already
    reordered: bool  # its axes were permuted or flipped, its values stayed
    low_passed: bool  # before it was resampled, since the grid is coarser
    coverage: float  # 0 to 1: the share of the grid's field that the volume's field covers

    @property
    def line(self) -> str:
        """The same in a few words."""
        if not self.resampled:
            return "reordered, not resampled" if self.reordered else "not resampled"
        how = "linear, after a low-pass, as it is coarser" if self.low_passed else "linear"
        return f"resampled ({how}); it covers {self.coverage:.0%} of the grid"


def onto_grid(moving: Volume, grid: Volume) -> Gridded:
    """`moving` on the voxels of another volume, whose values do not count."""
    if same_grid(grid, moving):
        return Gridded(moving.data, False, False, False, 1.0)
    turned = reordered(moving, grid.affine)
    if same_grid(grid, turned):
        return Gridded(turned.data, False, True, False, 1.0)
    smooth = low_passed(moving, grid.affine)
    data = resample(smooth, grid.data.shape, grid.affine)
    return Gridded(data, True, False, smooth is not moving, coverage(grid, moving))


# --- slices ----------------------------------------------------------------------------------


def slices(data: np.ndarray, affine: np.ndarray, axis: str) -> np.ndarray:
    """(I, J, K) or (I, J, K, 3) as its (N, H, W) or (N, H, W, 3) slices; a view, nothing is copied.

    Slices run to the left, to posterior or to superior, along the stored axis nearest to it.
    """
    ornt, _ = _to_lps(affine, data.shape[:3])
    view = orientations.apply_orientation(data, ornt)  # L P S
    if axis == "axial":
        return np.swapaxes(np.moveaxis(view, 2, 0), 1, 2)
    view = view[:, :, ::-1]  # L P I
    if axis == "coronal":
        view = np.swapaxes(view, 0, 1)  # P L I
    return np.swapaxes(view, 1, 2)


def _to_lps(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """nibabel's orientation from I, J, K to the nearest of L, P, S, and the affine after it."""
    lps = orientations.axcodes2ornt(("L", "P", "S"))
    ornt = orientations.ornt_transform(orientations.io_orientation(affine), lps)
    return ornt, affine @ orientations.inv_ornt_aff(ornt, shape)


def _lps_spacing(affine: np.ndarray) -> np.ndarray:
    """Distance of neighbouring voxels along the axes nearest to L, P and S, in mm: (3,)."""
    return np.linalg.norm(_to_lps(affine, (2, 2, 2))[1][:3, :3], axis=0)


def pick_axis(affine: np.ndarray, axis: str) -> str:
    """`axis`, or for "auto" the slices with the finest pixels; of nearly equal ones the axial."""
    if axis != "auto":
        return axis
    spacing = _lps_spacing(affine)
    coarsest = spacing >= 0.99 * spacing.max()  # that step lies between the finest slices
    return AXES[int(np.flatnonzero(coarsest).max())]


def pixel_sides(affine: np.ndarray, axis: str) -> tuple[float, float]:
    """Height and width of a pixel of `slices`, in mm."""
    left, back, up = _lps_spacing(affine)
    return {"axial": (back, left), "coronal": (up, left), "sagittal": (up, back)}[axis]


def slice_positions(shape: tuple[int, ...], affine: np.ndarray, axis: str) -> list[str]:
    """Where the middle of each slice lies, such as "S 12" for 12 mm superior of the origin."""
    ornt, affine = _to_lps(affine, shape)
    size = np.array(shape)[np.argsort(ornt[:, 0])]
    along = AXES.index(axis)
    index = np.tile(np.append((size - 1) / 2, 1), (size[along], 1))  # (N, 4)
    index[:, along] = np.arange(size[along])
    names = ("RL", "AP", "SI")[along]
    return [f"{names[0] if c >= 0 else names[1]} {abs(c):.0f}" for c in index @ affine[along]]
