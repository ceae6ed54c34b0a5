"""DICOM series for the tests: a volume with its affine, written slice by slice or as one file."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SECRET = "Doe^Jane"  # must never turn up in an output
STORAGE = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "NM": "1.2.840.10008.5.1.4.1.1.20",
}
ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1"}


def decimal(values) -> list[str]:
    """Numbers as DICOM stores them: text of at most 16 characters."""
    return [f"{float(v):.9g}"[:16] for v in np.ravel(values)]


def new_dataset(modality: str, sop: str, rows: int, columns: int) -> FileDataset:
    """An image without pixels, of a patient whose data must stay where they are."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = SECRET, f"ID {SECRET}", "19010203"
    ds.SeriesDescription = f"head of {SECRET}"
    ds.Modality, ds.Rows, ds.Columns = modality, rows, columns
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    return ds


def geometry(affine: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
    """Of a RAS affine: the LPS affine, ImageOrientationPatient and PixelSpacing."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return lps, decimal((lps[:3, :2] / spacing[:2]).T), decimal(spacing[[1, 0]])


class Series(NamedTuple):
    """What may differ in a written series."""

    slope: float = 1.0
    intercept: float = 0.0
    frame: str = "1.2.3"  # of reference, its UID
    series: str = "1.2.4"  # its UID
    order: Iterable[int] | None = None  # of the slices, by which they are numbered
    change: Callable | None = None  # (dataset, slice): edits each dataset before it is written


def write_series(
    folder: Path, data: np.ndarray, affine: np.ndarray, modality: str = "MR", **how
) -> list[Path]:
    """Write (I, J, K) integer values, one file a slice; `how` are the fields of `Series`."""
    how = Series(**how)
    folder.mkdir(parents=True, exist_ok=True)
    lps, orientation, spacing = geometry(affine)
    paths = []
    for n, k in enumerate(how.order if how.order is not None else range(data.shape[2])):
        ds = new_dataset(modality, STORAGE[modality], data.shape[1], data.shape[0])
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID = how.series, how.frame
        ds.SeriesNumber = 7
        ds.InstanceNumber = n + 1
        ds.ImagePositionPatient = decimal((lps @ [0, 0, k, 1])[:3])
        ds.ImageOrientationPatient, ds.PixelSpacing = orientation, spacing
        ds.SliceThickness = decimal(np.linalg.norm(affine[:3, 2]))[0]
        ds.RescaleSlope, ds.RescaleIntercept = decimal((how.slope, how.intercept))
        ds.PixelData = np.ascontiguousarray(data[:, :, k].T.astype("<i2")).tobytes()
        if how.change:
            how.change(ds, k)
        paths.append(folder / f"IM{n:04d}")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_enhanced(
    path: Path, data: np.ndarray, affine: np.ndarray, modality: str = "MR", order=None
) -> Path:
    """Write (I, J, K) as one enhanced multi-frame file; frame k has the rescale slope k + 1."""
    lps, orientation, spacing = geometry(affine)
    ds = new_dataset(modality, ENHANCED[modality], data.shape[1], data.shape[0])
    ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.5", "1.2.3"
    order = list(range(data.shape[2]) if order is None else order)
    ds.NumberOfFrames = len(order)
    measures, orient = Dataset(), Dataset()
    measures.PixelSpacing, orient.ImageOrientationPatient = spacing, orientation
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orient]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in order:
        position, rescale, own = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = decimal((lps @ [0, 0, k, 1])[:3])
        rescale.RescaleSlope, rescale.RescaleIntercept = k + 1, 0
        own.PlanePositionSequence, own.PixelValueTransformationSequence = [position], [rescale]
        ds.PerFrameFunctionalGroupsSequence.append(own)
    frames = np.stack([data[:, :, k].T for k in order]).astype("<i2")
    ds.PixelData = frames.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def injected(ds, k=0):
    """77.5 kg, 400 MBq of F-18, injected 109.77 minutes, its half-life, before the scan."""
    ds.Units, ds.DecayCorrection, ds.PatientWeight = "BQML", "START", "77.5"
    ds.SeriesDate, ds.SeriesTime = "20200131", "010000"
    ds.AcquisitionDate, ds.AcquisitionTime = "20200131", f"01{k:02d}00"
    drug = Dataset()
    drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = "400000000", "6586.2"
    drug.RadiopharmaceuticalStartTime = "231013.8"  # on the day before
    ds.RadiopharmaceuticalInformationSequence = [drug]


def sample(name: str) -> Path:
    """One of the files that come with pydicom."""
    return Path(pydicom.__file__).parent / "data" / "test_files" / name
