"""Volumes: one line with exit code 2 for what cannot be trusted."""

from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, sample, write_series
from volume_files import SHAPE, SPACING, affine_of, numbered, write

from volumes_io import RAS_LPS


def spoilt(tmp_path: Path, heads: dict[str, Path], kind: str) -> tuple[list, str]:
    """Arguments that must fail, and what the message must say."""
    affine, data = affine_of("identity"), numbered()
    ct, mri = heads["ct"], heads["mri"]
    folder, out = tmp_path / "dicom", tmp_path / "out" / "f.nii.gz"

    def both(img1=ct, img2=mri, *more):
        return ["--img1", img1, "--img2", img2, "--out", out, *more]

    def series(**how) -> Path:
        write_series(folder, data, affine, **how)
        return folder

    def changed(name, value, slices=(3,)):
        def change(ds, k):
            if k in slices:
                setattr(ds, name, value)

        return series(change=change)

    def nifti(data, affine=affine, code=1, change=None):
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, code)
        image.set_qform(affine, code)
        if change:
            change(image.header)
        image.to_filename(tmp_path / "v.nii")
        return tmp_path / "v.nii"

    def cut(path: Path, size: int) -> Path:
        short = tmp_path / path.name
        short.write_bytes(path.read_bytes()[:size])
        return short

    if kind == "two series":
        series()
        for path in folder.iterdir():
            path.rename(path.with_suffix(".a"))
        return both(img2=series(series="9.8")), "choose by --series2 one of 2 series"
    if kind == "missing slice":
        paths = write_series(folder, data, affine)
        paths[4].unlink()
        paths[5].unlink()
        return both(img2=folder), "2 slices missing in 1 gaps: 9.00 mm from IM0003 to IM0006"
    if kind == "duplicate slice":
        paths = write_series(folder, data, affine)
        (folder / "copy").write_bytes(paths[7].read_bytes())
        return both(img2=folder), "duplicate slices, 1 positions occur twice"
    if kind == "uneven":
        lps = RAS_LPS @ affine @ [0, 0, 4.6, 1]
        return both(img2=changed("ImagePositionPatient", list(lps[:3]), (4,))), "unevenly spaced"
    if kind == "mixed orientations":
        turned = [1, 0, 0, 0, 0, -1]
        return both(img2=changed("ImageOrientationPatient", turned)), "mixed orientations"
    if kind == "mixed sizes":
        return both(img2=changed("Rows", 27)), "mixed sizes"
    if kind == "no position":
        return both(img2=changed("ImagePositionPatient", None)), "does not say where"
    if kind == "value table":
        return both(img2=changed("ModalityLUTSequence", [pydicom.Dataset()])), "table of values"
    if kind == "rgb dicom":
        return both(img2=sample("SC_rgb_rle.dcm")), "colours are RGB, expected grey"
    if kind == "truncated dicom":
        return both(img2=sample("MR_truncated.dcm")), "truncated, damaged"
    if kind == "dicom cut in its header":
        path = write_series(folder, data, affine)[6]
        path.write_bytes(path.read_bytes()[:500])
        return both(img2=folder), "IM0006: damaged"
    if kind == "plugin":
        return both(img2=sample("MR_small_jpeg_ls_lossless.dcm")), "pip install pylibjpeg"
    if kind == "not dicom":
        folder.mkdir()
        (folder / "a.dcm").write_text("hello")
        return both(img2=folder), "no DICOM image among its 1 files"
    if kind == "not a dicom file":
        (tmp_path / "a.dcm").write_text("hello")
        return both(img2=tmp_path / "a.dcm"), "not a DICOM image"
    if kind == "no image":
        return both(img2=sample("rtplan.dcm")), "not a DICOM image"
    if kind == "empty folder":
        folder.mkdir()
        return both(img2=folder), "no DICOM image among its 0 files"
    if kind == "wrong modality":
        return both(img1=series()), "its modality is MR, CT-MRI expects CT as img1"
    if kind == "frames":
        write_series(tmp_path / "ct", data, affine, "CT", frame="1.2.99")
        return both(tmp_path / "ct", series()), "different DICOM frames of reference"
    if kind == "apart":
        away = affine.copy()
        away[0, 3] += 500
        return both(img2=nifti(data, away), img1=write(tmp_path / "c", data, affine, "nii")), (
            "covers only 0% of img1's field"
        )
    if kind == "under half":
        away = affine.copy()
        away[2, 3] += 0.55 * SHAPE[2] * SPACING[2]
        return both(img2=nifti(data, away), img1=write(tmp_path / "c", data, affine, "nii")), (
            "covers only 4"
        )
    if kind == "other space":
        return both(img2=nifti(data, code=4), img1=write(tmp_path / "c", data, affine, "nii")), (
            "in the scanner's space, img2 in MNI152 space"
        )
    if kind == "no place":
        return both(img2=nifti(data, code=0)), "img2 does not say where it is"
    if kind == "4-D":
        return both(img2=nifti(np.zeros((*SHAPE, 5), np.int16))), "is 4-D (5 volumes)"
    if kind == "2-D":
        return both(img2=nifti(np.zeros(SHAPE[:2], np.int16))), "is 2-D"
    if kind == "rgb nifti":
        rgb = np.zeros(SHAPE, [(c, "u1") for c in "RGB"])
        return both(img2=nifti(rgb)), "RGB or complex"
    if kind == "microns":
        return both(img2=nifti(data, change=lambda h: h.set_xyzt_units("micron"))), "in micron"
    if kind == "no affine":
        path = nifti(data)
        content = bytearray(path.read_bytes())
        content[280:328] = bytes(48)  # the sform's rows
        path.write_bytes(content)
        return both(img2=path), "singular"
    if kind == "truncated nii.gz":
        return both(img2=cut(mri, 20000)), "damaged or not NIfTI"
    if kind == "truncated nii":
        return both(img2=cut(write(tmp_path / "w", data, affine, "nii"), 5000)), "damaged"
    if kind == "truncated mha":
        return both(img2=cut(write(tmp_path / "w", data, affine, "mha"), 5000)), "damaged or not"
    if kind == "text nrrd":
        (tmp_path / "a.nrrd").write_text("hello")
        return both(img2=tmp_path / "a.nrrd"), "damaged or not .nrrd"
    if kind == "empty nii":
        return both(img2=cut(mri, 0)), "damaged or not NIfTI"
    if kind == "nan":
        holes = np.ones(SHAPE, np.float32)
        holes[3, 4, 5], holes[6, 7, 8] = np.nan, np.inf
        return both(img2=nifti(holes)), "2 voxels are NaN or infinite, the first at (3, 4, 5)"
    if kind == "constant":
        return both(img2=nifti(np.ones(SHAPE, np.int16)), img1=write(tmp_path / "c", data,
            affine, "nii")), "nothing to fuse"  # fmt: skip
    if kind == "thin":
        return both(ct, mri, "--axis", "coronal", "--img1", nifti(data[..., :12])), "--axis"
    if kind == "image":
        cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20), np.uint8))
        return both(img2=tmp_path / "a.png"), "not a DICOM image"
    if kind == "missing file":
        return both(img2=tmp_path / "no.nii"), "no such file"
    if kind == "out png":
        return ["--img1", ct, "--img2", mri, "--out", tmp_path / "f.png"], "ends in .nii.gz"
    if kind == "out is a source":
        return [*both(), "--out", ct], "is a source"
    if kind == "png in a source":
        return both(ct, series(), "--png", folder / "png"), "inside of one"
    if kind == "series of nifti":
        return both(ct, mri, "--series1", "1"), "--series1 is for DICOM"
    if kind == "window":
        return both(ct, mri, "--window", "lung"), "window is 'lung'"
    if kind == "colour of ct":
        return both(ct, mri, "--colour", "hot"), "--colour is for PET"
    if kind == "tile":
        return both(ct, mri, "--tile", "40"), "tile is 40"
    if kind == "overlap":
        return both(ct, mri, "--tile", "32", "--overlap", "20"), "overlap 20"
    if kind == "mosaic":
        return both(ct, mri, "--mosaic", tmp_path / "m.jpg"), "ends in .png"
    if kind == "stretch":
        return both(ct, mri, "--stretch"), "are for images"
    if kind == "all":
        return both(ct, mri, "--task", "all"), "need to know what img1 is"
    if kind == "flag of volumes":
        for name in "ab":
            cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((20, 20), np.uint8))
        pair = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "b.png"]
        return [*pair, "--out", tmp_path / "f.png", "--tile", "64"], "--tile is for volumes"
    raise AssertionError(kind)


SPOILT = (
    "two series;missing slice;duplicate slice;uneven;mixed orientations;mixed sizes;no position;"
    "value table;rgb dicom;truncated dicom;dicom cut in its header;plugin;not dicom;"
    "not a dicom file;no image;empty folder;wrong modality;frames;apart;under half;other space;"
    "no place;4-D;2-D;rgb nifti;microns;no affine;truncated nii.gz;truncated nii;truncated mha;"
    "text nrrd;empty nii;nan;constant;thin;image;missing file;out png;out is a source;"
    "png in a source;series of nifti;window;colour of ct;tile;overlap;mosaic;stretch;all;"
    "flag of volumes"
).split(";")


@pytest.mark.parametrize("kind", SPOILT)
def test_bad_input_is_one_line_and_writes_nothing(call, brighter, heads, tmp_path, kind):
    argv, message = spoilt(tmp_path, heads, kind)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = call(*argv)
    lines = [line for line in err.splitlines() if "slice/s" not in line]
    assert code == 2 and message in lines[-1] and len(lines) == 1, err
    assert SECRET not in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("frames", "forced: img1 and img2 have different DICOM"),
        ("under half", "forced: img2 covers only"),
        ("no place", "forced: img2 does not say"),
        ("wrong modality", "img1: forced: its modality is MR"),
    ],
)
def test_force_goes_on_and_says_so(call, brighter, heads, tmp_path, kind, words):
    argv, _ = spoilt(tmp_path, heads, kind)
    code, stdout, err = call(*argv, "--force")
    assert code == 0 and words in stdout, err
    assert (tmp_path / "out" / "f.nii.gz").exists()


def test_nan_to_zero_goes_on_and_says_so(call, brighter, heads, tmp_path):
    argv, _ = spoilt(tmp_path, heads, "nan")
    code, stdout, err = call(*argv, "--nan-to-zero", "--force")
    assert code == 0 and "2 voxels are NaN or infinite" in stdout and "taken as 0" in stdout, err
