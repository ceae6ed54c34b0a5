"""A segmentation of one source, brought onto the grid of the result: nearest neighbour.

A file of integers, NIfTI or another that volumes/io.py reads, or a DICOM segmentation (SEG) through
highdicom. It lies where its source lies, so it moves as that source does. Which source that is, its
grid tells, or its frame of reference, or `--labels-of`.

Sources: DICOM PS3.3, A.51 (segmentation); FreeSurfer's and others' label volumes in NIfTI.

Legend: I J K voxels as stored, see volumes/grid.py.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import SegmentationStorage

import limits
from cli import UserError, has_dicom_mark, installed
from volumes.dicom import read_dataset_of
from volumes.grid import RAS_LPS, Volume, same_voxels, set_place
from volumes.io import Header, read_volume, stream_nifti
from volumes.overlay import moved
from volumes.pair import Sources, Together
from volumes.quiet import quiet
from volumes.report import Report
from volumes.requests import Labels
from volumes.series import are_two, identity_of

LARGEST = 2**24  # float32, which volumes are read as, holds every integer below it
SEGMENTATIONS = (SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")  # the other: label maps


def read_labels(path: Path) -> Volume:
    """A volume of integers, (I, J, K) int32; UserError if its values are none.

    Args:
        path: a file as `read_volume` takes it, or a DICOM segmentation.
    """
    if not path.exists():
        raise UserError(f"--labels is {path}: no such file or folder")
    file = only_file(path)
    if file.is_file() and has_dicom_mark(file) and is_segmentation(file):
        return read_segmentation(file)
    volume = read_volume(path, None, "--labels")
    values = volume.data
    whole = np.isfinite(values).all() and (values == np.rint(values)).all()
    if not whole or values.max() >= LARGEST or values.min() <= -LARGEST:
        raise UserError(
            f"{path}: has values that are no labels, expected whole numbers; give a segmentation"
        )
    return replace(volume, data=values.astype(np.int32))


def only_file(path: Path) -> Path:
    """The file of a folder that has only one, else the path itself."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    return files[0] if len(files) == 1 else path


@quiet()
def is_segmentation(file: Path) -> bool:
    """Whether a DICOM file is a segmentation."""
    try:
        return read_dataset_of(file, ["SOPClassUID"]).get("SOPClassUID") in SEGMENTATIONS
    except UserError:
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        raise UserError(f"{file}: damaged, its DICOM header cannot be read") from None


@quiet()
def read_segmentation(file: Path) -> Volume:
    """A DICOM segmentation as labels, the number of each segment; UserError if it is no volume."""
    with installed("a DICOM segmentation needs"):
        from highdicom.seg import Segmentation
    try:
        ds = read_dataset_of(file)
        shape = int(ds.NumberOfFrames), int(ds.Rows), int(ds.Columns)
        limits.check_claim(file, shape, 1 / 2**14, packed=False)
        segmentation = Segmentation.from_dataset(ds)
        shape = segmentation.get_volume_geometry().spatial_shape
        limits.check_claim(file, shape, 0, packed=False)  # with the slices between its frames
        found = segmentation.get_volume(combine_segments=True, dtype=np.int32)
    except UserError:
        raise
    except Exception:  # of overlapping segments, of fractions, and of damage
        raise UserError(
            f"{file}: a DICOM segmentation that is not one volume of segments that exclude each "
            "other; convert it to NIfTI, one file for each segment"
        ) from None
    volume = Volume(np.asarray(found.array, np.int32), RAS_LPS @ found.affine, files=[file])
    frame = found.frame_of_reference_uid
    volume.frame_of_reference = str(frame) if frame else None
    volume.patient = identity_of(ds)
    return volume


def source_of_labels(labels: Volume, how: Labels, sources: tuple[Volume, Volume]) -> int:
    """Which source labels belong to, 1 or 2; UserError if neither grid nor frame tells."""
    if how.of:
        return how.of
    fits = [number for number, s in enumerate(sources, 1) if same_voxels(s, labels)]
    if not fits and labels.frame_of_reference:
        frames = [source.frame_of_reference for source in sources]
        fits = [n for n, frame in enumerate(frames, 1) if frame == labels.frame_of_reference]
    if len(fits) == 1:
        return fits[0]
    which = "both sources" if fits else "neither source"
    raise UserError(
        f"{how.path}: its grid is that of {which}, --labels-of 1 or --labels-of 2 says where it "
        "belongs"
    )


def bring_labels(
    how: Labels, sources: Sources, matrix: np.ndarray, together: Together, report: Report
) -> Volume:
    """The labels on the grid of the result.

    Args:
        sources: as they were read.
        matrix: (4, 4), from points of source 1 to points of source 2, as applied.
        together: the sources on the grid.
    """
    labels, both = read_labels(how.path), (sources.source1, sources.source2)
    still = np.allclose(matrix, np.eye(4))
    number = how.of if still else source_of_labels(labels, how, both)
    for n, source in enumerate(both, 1):
        if number in (0, n) and are_two(source.patient, labels.patient):
            raise UserError(f"{how.path}: of another patient than img{n}, the IDs and more differ")
    placed, grid = labels, together.source1
    if number == together.mover:
        placed = moved(labels, matrix if number == 1 else np.linalg.inv(matrix))
    data = nearest(placed, grid.data.shape, grid.affine)
    tell_labels(labels.data, data, number, report)
    return replace(labels, data=data, affine=grid.affine, code=grid.code)


def nearest(labels: Volume, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Labels on another grid, (I, J, K) of the smallest type that holds them; 0 beyond them."""
    source = sitk.GetImageFromArray(np.ascontiguousarray(labels.data.T))
    grid = sitk.Image([int(n) for n in shape], sitk.sitkUInt8)
    set_place(source, labels.affine)
    set_place(grid, affine)
    none = sitk.Transform()
    done = sitk.Resample(source, grid, none, sitk.sitkNearestNeighbor, 0, sitk.sitkInt32)
    values = sitk.GetArrayFromImage(done).T
    low, high = int(labels.data.min()), int(labels.data.max())
    for kind in (np.uint8, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values


def labels_nifti(labels: Volume, packed: bool) -> bytes:
    """The bytes of a NIfTI file of labels; `packed` by gzip."""
    file = io.BytesIO()
    header = Header(labels.affine, labels.code, "labels on the grid of the result")
    stream_nifti(file, labels.data, header, packed)
    return file.getvalue()


def tell_labels(before: np.ndarray, after: np.ndarray, number: int, report: Report) -> None:
    """How many labels came along, and which were lost as too small for the grid."""
    had, has = (set(np.unique(data).tolist()) - {0} for data in (before, after))
    of = f"of img{number}" if number else "of both sources"
    report.tell(f"labels: {len(has)}, {of}, nearest neighbour")
    if lost := sorted(had - has):
        names = ", ".join(map(str, lost[:8])) + (" and others" if len(lost) > 8 else "")
        report.doubt(f"labels without a voxel on the grid of the result: {names}")
