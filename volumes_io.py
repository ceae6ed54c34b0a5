"""Volumes: reading NIfTI, MetaImage and NRRD, writing NIfTI, and the geometry of their grids.

Sources: the NIfTI-1 header (nifti1.h: sform, qform, codes) through nibabel; MetaImage, NRRD and
linear resampling through SimpleITK. DICOM is in volumes_dicom.py.

Legend: I J K voxels of a volume as stored. An affine is (4, 4), from a voxel index (i, j, k, 1) to
millimetres in RAS+ (x to the patient's right is positive, y anterior, z superior), as in NIfTI.
DICOM and ITK count in LPS+: x and y change their sign. An array of SimpleITK is (K, J, I).
"""

import gzip
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from nibabel import orientations

NIFTI = (".nii", ".nii.gz")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
SCANNER = 1  # NIfTI code: coordinates of the scanner
SPACES = {1: "the scanner's", 2: "another scan's", 3: "Talairach", 4: "MNI152", 5: "a template's"}
STANDARD = (3, 4, 5)  # spaces of a template, never a patient's own
REGISTER = "register them first (ANTs, elastix, FSL FLIRT or 3D Slicer do)"
NEAR = 0.01  # of a voxel: positions closer than this are the same
SHEAR = 0.1  # of a voxel: how far a voxel may lie from where orthogonal axes would put it


@dataclass
class Volume:
    """A volume and where it is. `notes` are lines for the user, without anything of the patient."""

    data: np.ndarray  # (I, J, K) float32
    affine: np.ndarray
    code: int = SCANNER  # NIfTI code of its space
    placed: bool = True  # False: the file does not say where it is
    frame: str | None = None  # DICOM's frame of reference
    modality: str | None = None  # DICOM's: CT, MR, PT or NM
    suv: float | None = None  # body-weight SUV of a value of 1
    no_suv: str = "the file has no DICOM fields"  # why `suv` is None
    notes: list[str] = field(default_factory=list)

    @property
    def spacing(self) -> np.ndarray:
        """Distance of neighbouring voxels along I, J and K, in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def describe(self) -> str:
        """Size in voxels and mm."""
        sides = "x".join(map(str, self.data.shape))
        return f"{sides} voxels of {'x'.join(f'{s:.3g}' for s in self.spacing)} mm"


# --- files -----------------------------------------------------------------------------------


def read_nifti(path: Path) -> Volume:
    """A NIfTI-1 or -2 file (.nii, .nii.gz) of one grey volume; the sform wins over the qform.

    Raises:
        ValueError: damaged, not one 3-D volume, colour or complex voxels, not in millimetres.
    """
    try:
        image = nib.load(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            more = f" ({int(np.prod(shape[3:]))} volumes)" if len(shape) > 3 else ""
            raise ValueError(f"{path}: is {len(shape)}-D{more}, expected one 3-D volume")
        kind = image.get_data_dtype()
        if kind.fields or kind.kind not in "iuf":
            raise ValueError(f"{path}: voxels are RGB or complex, expected one grey value each")
        data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(
            shape, order="A"
        )
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        nib.spatialimages.ImageDataError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        raise ValueError(f"{path}: damaged or not NIfTI ({_first_line(error)})") from None
    header = image.header
    if header.get_xyzt_units()[0] in ("meter", "micron"):
        raise ValueError(f"{path}: lengths in {header.get_xyzt_units()[0]}, expected mm")
    codes = int(header["sform_code"]), int(header["qform_code"])
    volume = Volume(data, _checked(image.affine, path), code=codes[0] or codes[1] or SCANNER)
    volume.placed = any(codes)
    if all(codes):
        apart = displacement(shape, header.get_sform(), header.get_qform())
        if apart > SHEAR * volume.spacing.min():
            volume.notes.append(f"sform and qform differ by up to {apart:.3g} mm; the sform counts")
    return volume


def read_itk(path: Path) -> Volume:
    """A MetaImage (.mha, .mhd) or NRRD (.nrrd, .nhdr) file of one grey volume.

    Raises:
        ValueError: damaged, not one 3-D volume, or several values for each voxel.
    """
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = _first_line(str(error).rsplit("ERROR:", 1)[-1])
        raise ValueError(f"{path}: damaged or not {path.suffix} ({reason})") from None
    if image.GetDimension() != 3:
        raise ValueError(f"{path}: is {image.GetDimension()}-D, expected one 3-D volume")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path}: voxels are RGB or vectors, expected one grey value each")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    placed = path.suffix.lower() in (".mha", ".mhd") or "NRRD_space" in image.GetMetaDataKeys()
    data = sitk.GetArrayFromImage(image).astype(np.float32, copy=False).T
    return Volume(data, _checked(RAS_LPS @ affine, path), placed=placed)


def write_nifti(
    path: Path, data: np.ndarray, affine: np.ndarray, code: int, text: str, slope: float = 1.0
) -> None:
    """Write a NIfTI-1 file with sform and qform; beside `path` first, so there is never half of it.

    Args:
        data: (I, J, K), or (I, J, K, 3) uint8 RGB.
        text: the header's description, at most 79 characters of it.
        slope: what a reader multiplies the stored values with.
    """
    if data.ndim == 4:
        data = data.view([(c, "u1") for c in "RGB"])[..., 0]
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = text.encode("ascii", "replace")[:79]
    if slope != 1:
        image.header.set_slope_inter(slope, 0)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            if path.name.lower().endswith(".gz"):
                # no name and no time in it: the same volume gives the same bytes
                with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                    image.to_stream(packed)
            else:
                image.to_stream(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _checked(affine: np.ndarray, path: Path) -> np.ndarray:
    affine = np.asarray(affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: its affine is singular or not finite, its place is unknown")
    return affine


def _first_line(error: Exception | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


# --- grids -----------------------------------------------------------------------------------


def displacement(shape: tuple[int, ...], affine1: np.ndarray, affine2: np.ndarray) -> float:
    """The farthest, in mm, that two affines place one voxel of a grid apart."""
    corners = np.array([(*c, 1) for c in np.ndindex(2, 2, 2)]) * (*(np.array(shape) - 1), 1)
    return float(np.linalg.norm((corners @ (affine1 - affine2).T)[:, :3], axis=1).max())


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes have their voxels at the same places, in the same order."""
    if a.data.shape != b.data.shape:
        return False
    return displacement(a.data.shape, a.affine, b.affine) < NEAR * a.spacing.min()


def reordered(volume: Volume, affine: np.ndarray) -> Volume:
    """The same voxels, axes permuted and flipped to run as nearly as they can along `affine`'s."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(volume.affine), orientations.io_orientation(affine)
    )
    data = orientations.apply_orientation(volume.data, turn)
    moved = volume.affine @ orientations.inv_ornt_aff(turn, volume.data.shape)
    return replace(volume, data=data, affine=moved)


def overlap(fixed: Volume, moving: Volume) -> float:
    """The share of `fixed`'s field that `moving`'s field covers, on about 40 points an axis."""
    shape = np.array(fixed.data.shape)
    points = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(np.minimum(shape, 40), shape)]  # noqa: B905
    grid = np.stack([*np.meshgrid(*points, indexing="ij"), np.ones(np.minimum(shape, 40))])
    to_moving = np.linalg.inv(moving.affine) @ fixed.affine
    index = np.tensordot(to_moving[:3], grid, 1)  # (3, …) in moving's voxels
    last = np.array(moving.data.shape)[:, None, None, None] - 0.5
    return float(((index >= -0.5 - NEAR) & (index <= last + NEAR)).all(0).mean())


def resample(moving: Volume, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """`moving` on another grid, (I, J, K) float32: linear; its minimum where it has no voxel."""
    source = sitk.GetImageFromArray(moving.data.T)
    grid = sitk.Image([int(n) for n in shape], sitk.sitkUInt8)
    for image, place in ((source, moving.affine), (grid, affine)):
        lps = RAS_LPS @ place
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
    fill = float(moving.data.min())
    moved = sitk.Resample(source, grid, sitk.Transform(), sitk.sitkLinear, fill, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(moved).T


def straightened(volume: Volume) -> Volume:
    """The volume itself, or resampled to right angles if its axes are sheared, as by a gantry tilt.

    A sheared grid has no qform, and ITK's viewers would show it elsewhere.
    """
    columns, spacing = volume.affine[:3, :3], volume.spacing
    u, _, v = np.linalg.svd(columns / spacing)
    upright = volume.affine.copy()
    upright[:3, :3] = u @ v * spacing
    middle = np.append((np.array(volume.data.shape) - 1) / 2, 1)
    upright[:3, 3] += ((volume.affine - upright) @ middle)[:3]
    apart = displacement(volume.data.shape, volume.affine, upright)
    if apart <= SHEAR * spacing.min():
        return volume
    axes, r = np.linalg.qr(columns)  # the in-plane axes stay, the third becomes their normal
    axes, r = axes * np.sign(np.diag(r)), r * np.sign(np.diag(r))[:, None]
    step = np.abs(np.diag(r))
    edges = np.array(list(np.ndindex(2, 2, 2))) * volume.data.shape - 0.5
    along = edges @ columns.T @ axes  # mm along each new axis, from voxel 0
    low = np.round(along.min(0) / step, 6) + 0.5
    size = np.ceil(np.round(along.max(0) / step - low + 0.5, 6)).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = axes * step
    affine[:3, 3] = volume.affine[:3, 3] + axes @ (low * step)
    tilt = np.degrees(np.arccos(np.clip(step[2] / spacing[2], -1, 1)))
    note = f"sheared axes (tilt {tilt:.1f} degrees), resampled to right angles"
    data = resample(volume, tuple(size), affine)
    return replace(volume, data=data, affine=affine, notes=[*volume.notes, note])


def check_space(fixed: Volume, moving: Volume, force: bool) -> list[str]:
    """Lines on what is in doubt about two volumes being in one patient space.

    Raises ValueError for what must not be passed over without `force`.
    """
    doubts, notes = [], []
    for name, volume in (("img1", fixed), ("img2", moving)):
        if not volume.placed:
            doubts.append(
                f"{name} does not say where it is in the patient (no sform, qform, space)"
            )
    spaces = {v.code for v in (fixed, moving)}
    if len(spaces) == 2 and spaces & set(STANDARD):
        first, second = (SPACES.get(v.code, "unknown") for v in (fixed, moving))
        doubts.append(f"img1 is in {first} space, img2 in {second} space, {REGISTER}")
    frames = fixed.frame, moving.frame
    if all(frames) and frames[0] != frames[1]:
        doubts.append(f"img1 and img2 have different DICOM frames of reference, {REGISTER}")
    elif not all(frames):
        notes.append(
            "not both files name a DICOM frame of reference: taken as one patient space, unchecked"
        )
    share = overlap(fixed, moving)
    if share < 0.5:
        doubts.append(f"img2 covers only {share:.0%} of img1's field, expected half, {REGISTER}")
    if doubts and not force:
        raise ValueError(f"{'; '.join(doubts)}; --force fuses all the same")
    return [*(f"forced: {doubt}" for doubt in doubts), *notes]


def onto_grid(moving: Volume, fixed: Volume) -> tuple[np.ndarray, str]:
    """`moving` on `fixed`'s voxels, (I, J, K) float32, and a line that says what was done to it."""
    if same_grid(fixed, moving):
        return moving.data, "img1 and img2 are on one grid, nothing was resampled"
    turned = reordered(moving, fixed.affine)
    if same_grid(fixed, turned):
        return turned.data, "img2 is on img1's voxels in another order: reordered, not resampled"
    share = overlap(fixed, moving)
    data = resample(moving, fixed.data.shape, fixed.affine)
    return data, (
        f"img2 was resampled onto img1's grid (linear); it covers {share:.0%} of it. Nothing was "
        f"registered: if they do not lie on each other, {REGISTER}"
    )
