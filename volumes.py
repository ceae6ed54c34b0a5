"""Fuse two volumes of one patient, slice by slice: DICOM, NIfTI, MetaImage or NRRD in, NIfTI out.

    python test_asfe.py --task CT-MRI --img1 ct.nii.gz --img2 dicom_folder/ --out fused.nii.gz

The fused volume lies on source 1's grid; source 2 is resampled onto it where its own differs.
Reading and geometry are in volumes_io.py and volumes_dicom.py, intensities in volumes_levels.py,
tiles of large slices in volumes_tiles.py.

Legend: I J K voxels as stored; N slices of (H, W) pixels as they are looked at, with the patient's
left on the right and anterior or superior on top. Affines and RAS as in volumes_io.py.
"""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import SimpleITK as sitk  # noqa: N813
from nibabel import orientations
from tqdm import tqdm

from args_setting import TASKS, TestArgs
from dataset import to_uint8, writable_folder, write_bytes, write_png
from network import MIN_SIDE, ASFEFusion
from volumes_dicom import read_dicom
from volumes_io import (
    ITK,
    NIFTI,
    Volume,
    check_space,
    onto_grid,
    read_itk,
    read_nifti,
    straightened,
    write_nifti,
)
from volumes_levels import MODALITIES, Levels, colour_table, levels
from volumes_tiles import fuse_tiled

TOP = 32767  # the stored value of a luma of 1: int16, with the slope 1 / TOP
AXES = ("sagittal", "coronal", "axial")  # the axes L, P, S of a patient
BATCH_PIXELS = 256**2  # --batch_size counts pairs of this size, so that large slices fit, too
CELL, COLUMNS, ROWS = 180, 6, 4  # of the mosaic
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom


class Outputs(NamedTuple):
    """The files of a run; None where not asked for."""

    grey: Path
    sidecar: Path
    colour: Path | None
    png: Path | None
    mosaic: Path | None


# --- slices ----------------------------------------------------------------------------------


def slices(data: np.ndarray, affine: np.ndarray, axis: str) -> np.ndarray:
    """(I, J, K) or (I, J, K, 3) as its (N, H, W) or (N, H, W, 3) slices; a view, nothing is copied.

    Slices run to the left, to posterior or to superior, along the stored axis nearest to it.
    """
    turn, _ = _to_lps(affine, data.shape[:3])
    view = orientations.apply_orientation(data, turn)
    if axis == "axial":
        return np.swapaxes(np.moveaxis(view, 2, 0), 1, 2)
    view = view[:, :, ::-1]
    if axis == "coronal":
        view = np.swapaxes(view, 0, 1)  # P L I
    return np.swapaxes(view, 1, 2)


def _to_lps(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The turn from I, J, K to the nearest of L, P, S, and the affine of the turned grid."""
    lps = orientations.axcodes2ornt(("L", "P", "S"))
    turn = orientations.ornt_transform(orientations.io_orientation(affine), lps)
    return turn, affine @ orientations.inv_ornt_aff(turn, shape)


def pick_axis(affine: np.ndarray, axis: str) -> str:
    """`axis`, or for "auto" the slices with the finest pixels; of nearly equal ones the axial."""
    if axis != "auto":
        return axis
    spacing = np.linalg.norm(_to_lps(affine, (2, 2, 2))[1][:3, :3], axis=0)
    near = spacing >= 0.99 * spacing.max()  # the coarsest step lies between the finest slices
    return AXES[int(np.flatnonzero(near).max())]


def pixel_sides(affine: np.ndarray, axis: str) -> tuple[float, float]:
    """Height and width of a pixel of `slices`, in mm."""
    left, back, up = np.linalg.norm(_to_lps(affine, (2, 2, 2))[1][:3, :3], axis=0)
    return {"axial": (back, left), "coronal": (up, left), "sagittal": (up, back)}[axis]


def slice_places(shape: tuple[int, ...], affine: np.ndarray, axis: str) -> list[str]:
    """Where the middle of each slice lies, such as "S 12" for 12 mm superior of the origin."""
    turn, affine = _to_lps(affine, shape)
    size = np.array(shape)[np.argsort(turn[:, 0])]
    along = AXES.index(axis)
    index = np.tile(np.append((size - 1) / 2, 1), (size[along], 1))
    index[:, along] = np.arange(size[along])
    names = ("RL", "AP", "SI")[along]
    return [f"{names[0] if c >= 0 else names[1]} {abs(c):.0f}" for c in index @ affine[along]]


def fuse_slices(
    model: ASFEFusion,
    stacks: tuple[np.ndarray, np.ndarray],
    scales: tuple[Levels, Levels],
    out: np.ndarray,
    args: TestArgs,
) -> None:
    """Fuse the slices of two (N, H, W) stacks into `out`, (N, H, W) int16 of luma times TOP."""
    count, height, width = out.shape
    side = height * width if not args.tile else min(args.tile, height) * min(args.tile, width)
    batch = max(1, min(args.batch_size, args.batch_size * BATCH_PIXELS // side))
    with tqdm(total=count, unit="slice", desc=f"{args.size} {args.task}") as progress:
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            pair = [s.apply(stack[part])[:, None] for s, stack in zip(scales, stacks, strict=True)]
            luma = fuse_tiled(model, *pair, args.tile, args.overlap)
            out[part] = np.rint(luma[:, 0] * TOP)
            progress.update(len(luma))


# --- pictures --------------------------------------------------------------------------------


def colour_slices(luma: np.ndarray, uptake: np.ndarray, table: np.ndarray) -> np.ndarray:
    """RGB uint8 (…, 3): the fused luma with the chroma that the table has for the uptake."""
    return to_uint8(luma[..., None] + table[np.rint(uptake * 255).astype(np.uint8)])


def mosaic(
    stack: np.ndarray, places: list[str], axis: str, pixel: tuple[float, float]
) -> np.ndarray:
    """A lightbox (RGB, uint8) of up to 24 slices that show something, in true proportion.

    Each is named by its place; the first has the patient's directions at its edges.

    Args:
        stack: (N, H, W) luma times TOP, or (N, H, W, 3) uint8 RGB.
        places: a name for each slice.
        pixel: height and width of a pixel in mm.
    """
    bright = [float(image.mean()) for image in stack]
    full = np.flatnonzero(np.array(bright) > 0.1 * max(bright)) if max(bright) else [0]
    count = min(COLUMNS * ROWS, full[-1] - full[0] + 1)
    shown = np.unique(np.linspace(full[0], full[-1], count).round().astype(int))
    height, width = np.array(stack.shape[1:3]) * pixel
    scale = CELL / max(height, width)
    height, width = (max(1, round(n * scale)) for n in (height, width))
    rows = -(-len(shown) // COLUMNS)
    sheet = np.zeros((rows * (height + 2) - 2, COLUMNS * (width + 2) - 2, 3), np.uint8)
    for i, n in enumerate(shown):
        shrinks = stack.shape[1] > height
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cell = cv2.resize(eight_bit(stack[n]), (width, height), interpolation=how)
        cell = cell if cell.ndim == 3 else cv2.cvtColor(cell, cv2.COLOR_GRAY2RGB)
        _text(cell, places[n], (3, height - 5))
        if i == 0:
            middle = height // 2 + 4, width // 2 - 4
            sides = (2, middle[0]), (width - 11, middle[0])
            ends = (middle[1], 12), (middle[1], height - 4)
            for letter, place in zip(LETTERS[axis], (*sides, *ends), strict=True):
                _text(cell, letter, place)
        top, left = i // COLUMNS * (height + 2), i % COLUMNS * (width + 2)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def eight_bit(image: np.ndarray) -> np.ndarray:
    """A slice of luma times TOP as 8-bit grey; RGB as it is."""
    grey = image.dtype != np.uint8
    return to_uint8(image / np.float32(TOP)) if grey else np.ascontiguousarray(image)


def _text(image: np.ndarray, text: str, place: tuple[int, int]) -> None:
    for colour, thick in (((0, 0, 0), 3), ((235, 235, 120), 1)):  # legible on any grey
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, thick, cv2.LINE_AA)


# --- a run -----------------------------------------------------------------------------------


def fuse_volumes(args: TestArgs, model: ASFEFusion) -> None:
    """Fuse the volumes --img1 and --img2 into --out and what else the settings ask for."""
    outputs = plan_outputs(args)
    if args.tile and (args.tile % model.multiple or args.overlap > args.tile - model.multiple):
        raise ValueError(
            f"tile is {args.tile} and overlap {args.overlap}, expected a multiple of "
            f"{model.multiple} and at least {model.multiple} less"
        )
    if args.threads:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    fixed, moved, report = read_both(args)
    kinds = TASKS[args.task], "MRI"
    scales = tuple(
        levels(volume, kind, args.window, args.suv)
        for volume, kind in zip((fixed, moved), kinds, strict=True)
    )
    report += [scale.text for scale in scales]
    if scales[0].method.get("no_suv"):
        report.append(f"no SUV ({scales[0].method['no_suv']}): {kinds[0]} scaled to its maximum")
    axis = pick_axis(fixed.affine, args.axis)
    luma = np.empty(fixed.data.shape, np.int16, order="F")  # as NIfTI stores it
    stacks = tuple(slices(data, fixed.affine, axis) for data in (fixed.data, moved.data))
    out = slices(luma, fixed.affine, axis)
    if min(out.shape[1:]) < MIN_SIDE:
        sides = "x".join(map(str, out.shape[1:]))
        raise ValueError(
            f"{axis} slices are {sides} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}; --axis "
            "chooses others"
        )
    report.append(f"{len(out)} {axis} slices of {out.shape[1]}x{out.shape[2]}")
    print("\n".join(report))
    for folder in {path.resolve().parent for path in outputs if path} | {outputs.png}:
        if folder:
            writable_folder(folder)
    fuse_slices(model, stacks, scales, out, args)
    write_all(args, outputs, fixed, luma, scales, axis, report)


def plan_outputs(args: TestArgs) -> Outputs:
    """Every file that the settings ask for; ValueError if one may not be written."""
    name = args.out.name.lower()
    suffix = next((s for s in reversed(NIFTI) if name.endswith(s)), None)
    if suffix is None or args.out.is_dir():
        raise ValueError(
            f"--out is {args.out}, expected a file name that ends in .nii.gz or .nii for volumes"
        )
    if args.task == "all":
        raise ValueError(f"task is all, but volumes need to know what img1 is: {', '.join(TASKS)}")
    stem = args.out.name[: -len(suffix)]
    if args.colour and args.task == "CT-MRI":
        raise ValueError("--colour is for PET and SPECT, CT and MRI are grey")
    if args.mosaic and args.mosaic.suffix.lower() != ".png":
        raise ValueError(f"--mosaic is {args.mosaic}, expected a file name that ends in .png")
    if args.stretch or args.metrics:
        raise ValueError("--stretch and --metrics are for images, not for volumes")
    outputs = Outputs(
        args.out,
        args.out.with_name(f"{stem}.json"),
        args.out.with_name(f"{stem}_colour{suffix}") if args.colour else None,
        args.png,
        args.mosaic,
    )
    for source in (args.img1.resolve(), args.img2.resolve()):
        for path in filter(None, outputs):
            path = path.resolve()
            if path == source or (source.is_dir() and source in path.parents):
                raise ValueError(f"{path} is a source or inside of one, choose another place")
    return outputs


def read_volume(path: Path, series: str | None, flag: str) -> Volume:
    """A volume of any kind that we read; `series` chooses among several in a DICOM folder."""
    name = path.name.lower()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file() and name.endswith((*NIFTI, *ITK)):
        if series is not None:
            raise ValueError(f"{flag} is for DICOM, but {path} is none")
        return read_nifti(path) if name.endswith(NIFTI) else read_itk(path)
    return read_dicom(path, series, flag)


def read_both(args: TestArgs) -> tuple[Volume, Volume, list[str]]:
    """Source 1, source 2 on source 1's grid, and lines that tell what was done to them."""
    report, volumes = [], []
    for i, kind in enumerate((TASKS[args.task], "MRI"), 1):
        path = getattr(args, f"img{i}")
        volume = read_volume(path, getattr(args, f"series{i}"), f"--series{i}")
        check_values(volume, path, args.nan_to_zero)
        if volume.modality not in (None, MODALITIES[kind]):
            doubt = f"its modality is {volume.modality}, {args.task} expects {MODALITIES[kind]}"
            if not args.force:
                raise ValueError(f"{path}: {doubt} as img{i}; --force fuses all the same")
            volume.notes.append(f"forced: {doubt}")
        if kind == "CT" and volume.data.min() >= 0:
            volume.notes.append("no value below 0: is it in HU? --window can take another scale")
        if i == 1:
            volume = straightened(volume)
        report.append(f"img{i}: {kind}, {volume.describe()}")
        report += [f"img{i}: {note}" for note in volume.notes]
        volumes.append(volume)
    fixed, moving = volumes
    report += check_space(fixed, moving, args.force)
    data, line = onto_grid(moving, fixed)
    moving.data, moving.affine = data, fixed.affine
    return fixed, moving, [*report, line]


def check_values(volume: Volume, path: Path, nan_to_zero: bool) -> None:
    """Name voxels that are not finite, or make them 0 where that was asked for."""
    wrong = ~np.isfinite(volume.data)
    count = int(wrong.sum())
    if not count:
        return
    first = np.unravel_index(int(wrong.argmax()), wrong.shape)
    where = ", ".join(str(int(i)) for i in first)
    line = f"{count} voxels are NaN or infinite, the first at ({where})"
    if not nan_to_zero:
        raise ValueError(f"{path}: {line}; --nan-to-zero takes them as 0")
    volume.data[wrong] = 0
    volume.notes.append(f"{line}: taken as 0")


def write_all(
    args: TestArgs,
    outputs: Outputs,
    fixed: Volume,
    luma: np.ndarray,
    scales: tuple[Levels, Levels],
    axis: str,
    report: list[str],
) -> None:
    """Write what `outputs` names."""
    text = f"ASFE {args.task}; {'; '.join(scale.text for scale in scales)}"
    out = slices(luma, fixed.affine, axis)
    pictures = out  # made 8-bit slice by slice
    if args.colour:
        rgb = np.empty((*luma.shape[::-1], 3), np.uint8).transpose(2, 1, 0, 3)
        pictures = slices(rgb, fixed.affine, axis)
        uptake, table = slices(fixed.data, fixed.affine, axis), colour_table(args.colour)
        for n, picture in enumerate(pictures):
            picture[:] = colour_slices(out[n] / np.float32(TOP), scales[0].apply(uptake[n]), table)
        write_nifti(outputs.colour, rgb, fixed.affine, fixed.code, text)
    if outputs.png:
        for n, image in enumerate(pictures):
            write_png(outputs.png / f"{axis}_{n:04d}.png", eight_bit(image))
    if outputs.mosaic:
        places = slice_places(luma.shape, fixed.affine, axis)
        pixel = pixel_sides(fixed.affine, axis)
        write_png(outputs.mosaic, mosaic(pictures, places, axis, pixel))
    write_bytes(outputs.sidecar, sidecar(args, fixed, scales, axis, report).encode())
    write_nifti(outputs.grey, luma, fixed.affine, fixed.code, text, 1 / TOP)
    for what, path in outputs._asdict().items():
        if path:
            print(f"{what}: {path}")


def sidecar(
    args: TestArgs, fixed: Volume, scales: tuple[Levels, Levels], axis: str, report: list[str]
) -> str:
    """What was done, as JSON: settings and geometry; no paths, no UIDs, nothing of a patient."""
    content = {
        "software": "ASFE-Fusion",
        "task": args.task,
        "network": args.size,
        "values": "fused luma, 0 to 1",
        "levels": {"source1": scales[0].method, "source2": scales[1].method},
        "grid": {"of": "source 1", "affine_ras_mm": fixed.affine.tolist()},
        "slices": axis,
        "tile": args.tile or None,
        "overlap": args.overlap if args.tile else None,
        "colour": args.colour,
        "report": report,
    }
    return json.dumps(content, indent=1) + "\n"
