"""Volumes: one line with exit code 2 for what cannot be trusted."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, sample, write_series
from volume_files import SHAPE, SPACING, affine_of, numbered, write

from cli import UserError
from volumes.grid import RAS_LPS
from volumes.io import read_volume

AFFINE, DATA = affine_of("identity"), numbered()
WINDOW = ["--window", "2000,4000"]  # DATA is not in HU
OFF = ["--register", "off"]  # for volumes that show nothing to register by


class Inputs:
    """Makes the files of one test in its folder, and the arguments that name them."""

    def __init__(self, folder: Path, heads: dict[str, Path]):
        self.path, self.ct, self.mri = folder, heads["ct"], heads["mri"]
        self.dicom, self.out = folder / "dicom", folder / "out" / "f.nii.gz"

    def args(self, *more, img1=None, img2=None) -> list:
        """The arguments of a run, on a good pair but for what is given."""
        return self.plain(*WINDOW, *more, img1=img1, img2=img2)

    def plain(self, *more, img1=None, img2=None) -> list:
        """The same without a window, which is for CT."""
        return ["--img1", img1 or self.ct, "--img2", img2 or self.mri, "--out", self.out, *more]

    def series(self, **how) -> Path:
        """A DICOM folder, an MRI unless `how` says otherwise."""
        write_series(self.dicom, DATA, AFFINE, **how)
        return self.dicom

    def changed(self, name: str, value, slices=(3,)) -> list:
        """Arguments with an MRI series in which some slices have another value of a field."""

        def change(ds, k):
            if k in slices:
                setattr(ds, name, value)

        return self.args(img2=self.series(change=change))

    def nifti(self, data=DATA, affine=AFFINE, code=1, change=None) -> Path:
        """A NIfTI file; `change` edits its header."""
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, code)
        image.set_qform(affine, code)
        if change:
            change(image.header)
        image.to_filename(self.path / "v.nii")
        return self.path / "v.nii"

    def good(self, form="nii") -> Path:
        """A volume on the grid of `nifti`'s."""
        return write(self.path / "c", DATA, AFFINE, form)

    def shifted(self, mm, axis) -> list:
        """Arguments with an MRI that lies so far from the CT along x, y or z."""
        away = AFFINE.copy()
        away[axis, 3] += mm
        return self.args(*OFF, img1=self.good(), img2=self.nifti(affine=away))

    def cut(self, path: Path, size: int) -> list:
        """Arguments with an MRI file that has only its first bytes."""
        short = self.path / path.name
        short.write_bytes(path.read_bytes()[:size])
        return self.args(img2=short)

    def text(self, name: str) -> Path:
        """A text file."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("hello")
        return path


def two_series(on: Inputs) -> list:
    for path in on.series().iterdir():
        path.rename(path.with_suffix(".a"))
    return on.args(img2=on.series(series="9.8"))


def missing_slice(on: Inputs) -> list:
    for path in write_series(on.dicom, DATA, AFFINE)[4:6]:
        path.unlink()
    return on.args(img2=on.dicom)


def duplicate_slice(on: Inputs) -> list:
    """Another image at the place of one, not a copy of its file."""
    ds = pydicom.dcmread(write_series(on.dicom, DATA, AFFINE)[7])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.77"
    ds.save_as(on.dicom / "other")
    return on.args(img2=on.dicom)


def uneven(on: Inputs) -> list:
    lps = RAS_LPS @ AFFINE @ [0, 0, 4.6, 1]
    return on.changed("ImagePositionPatient", list(lps[:3]), (4,))


def cut_in_the_header(on: Inputs) -> list:
    path = write_series(on.dicom, DATA, AFFINE)[6]
    path.write_bytes(path.read_bytes()[:500])
    return on.args(img2=on.dicom)


def broken_field(on: Inputs) -> list:
    """pydicom meets it only when the field is asked for."""
    path = write_series(on.dicom, DATA, AFFINE)[6]
    name, spoilt = b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x00QQ"  # SeriesInstanceUID
    assert name in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(name, spoilt))
    return on.args(img2=on.dicom)


def empty_folder(on: Inputs) -> list:
    on.dicom.mkdir()
    return on.args(img2=on.dicom)


def two_frames_of_reference(on: Inputs) -> list:
    write_series(on.path / "ct", DATA, AFFINE, "CT", frame="1.2.99")
    return on.args(*OFF, img1=on.path / "ct", img2=on.series())


def lying_nifti(on: Inputs, sizes: tuple[int, int, int], pack: bool = False) -> list:
    """A good NIfTI file but for the sizes in its header."""
    path = on.nifti()
    content = bytearray(path.read_bytes())
    content[42:48] = struct.pack("<3h", *sizes)
    path.write_bytes(content)
    if pack:
        path = path.with_suffix(".nii.gz")
        path.write_bytes(gzip.compress(bytes(content[:352])))
    return on.args(img2=path)


def lying_text(on: Inputs, form: str, sizes: bytes) -> list:
    """A good MetaImage or NRRD file but for the sizes in its header."""
    path = on.good(form)
    good = " ".join(map(str, SHAPE)).encode()
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, sizes))
    return on.args(img2=path)


def lying_enhanced(on: Inputs) -> list:
    """Frames that are times or gates, so that none of them has a header of its own."""

    def change(ds, k):
        ds.NumberOfFrames, ds.ImageType = 99_999_999, ["ORIGINAL", "PRIMARY", "RECON TOMO"]

    return on.args(img2=write_series(on.dicom, DATA, AFFINE, change=change)[0])


def rows_of_zeros(on: Inputs) -> list:
    path = on.nifti()
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # the sform's rows
    path.write_bytes(content)
    return on.args(img2=path)


def unknown_unit(on: Inputs) -> list:
    def change(header):
        header["xyzt_units"] = 7

    return on.args(img2=on.nifti(change=change))


def not_finite(on: Inputs) -> list:
    holes = np.ones(SHAPE, np.float32)
    holes[3, 4, 5], holes[6, 7, 8] = np.nan, np.inf
    return on.args(img2=on.nifti(holes))


def png_source(on: Inputs) -> list:
    cv2.imwrite(str(on.path / "a.png"), np.zeros((20, 20), np.uint8))
    return on.args(img2=on.path / "a.png")


def png_sources(on: Inputs) -> list:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(on.path / name), np.zeros((20, 20), np.uint8))
    pair = ["--img1", on.path / "a.png", "--img2", on.path / "b.png"]
    return [*pair, "--out", on.path / "f.png", "--tile", "64"]


# name -> what the message must say, and how to make the arguments
SPOILT: dict[str, tuple[str, Callable[[Inputs], list]]] = {
    # DICOM
    "two series": ("choose by --series2 one of 2 series", two_series),
    "missing slice": ("2 slices missing in 1 gaps: 9.00 mm from IM0003 to IM0006", missing_slice),
    "duplicate slice": ("duplicate slices, 1 positions occur twice", duplicate_slice),
    "uneven": ("unevenly spaced", uneven),
    "mixed orientations": (
        "1 images with other orientations left out",
        lambda on: on.changed("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
    ),
    "mixed sizes": ("with other sizes left", lambda on: on.changed("Rows", 27)),
    "half of each size": (
        "mixed sizes in one series",
        lambda on: on.changed("Rows", 27, range(0, 20, 2)),
    ),
    "no position": ("does not say where", lambda on: on.changed("ImagePositionPatient", None)),
    "value table": (
        "table of values",
        lambda on: on.changed("ModalityLUTSequence", [pydicom.Dataset()]),
    ),
    "rgb dicom": (
        "colours are RGB, expected grey",
        lambda on: on.args(img2=sample("SC_rgb_rle.dcm")),
    ),
    "truncated dicom": ("truncated, damaged", lambda on: on.args(img2=sample("MR_truncated.dcm"))),
    "dicom cut in its header": ("IM0006: damaged", cut_in_the_header),
    "dicom with a broken field": ("IM0006: damaged", broken_field),
    "no frames": ("IM0000: damaged", lambda on: on.changed("NumberOfFrames", "-1", (0,))),
    "not dicom": (
        "no DICOM image among its 1 files",
        lambda on: on.args(img2=on.text("dicom/a.dcm").parent),
    ),
    "not a dicom file": ("not a DICOM image", lambda on: on.args(img2=on.text("a.dcm"))),
    "no image": ("not a DICOM image", lambda on: on.args(img2=sample("rtplan.dcm"))),
    "empty folder": ("no DICOM image among its 0 files", empty_folder),
    # patient space
    "wrong modality": (
        "its modality is MR, CT-MRI expects CT as img1",
        lambda on: on.args(img1=on.series()),
    ),
    "frames": ("different DICOM frames of reference", two_frames_of_reference),
    "apart": ("share only 0% of the smaller field", lambda on: on.shifted(500, 0)),
    "under half": ("share only 4", lambda on: on.shifted(0.55 * SHAPE[2] * SPACING[2], 2)),
    "other space": (
        "in the scanner's space, img2 in MNI152 space",
        lambda on: on.args(*OFF, img1=on.good(), img2=on.nifti(code=4)),
    ),
    "no place": ("img2 does not say where it is", lambda on: on.args(img2=on.nifti(code=0))),
    # NIfTI, MetaImage, NRRD
    "4-D": (
        "is 4-D (5 volumes)",
        lambda on: on.args(img2=on.nifti(np.zeros((*SHAPE, 5), np.int16))),
    ),
    "2-D": ("is 2-D", lambda on: on.args(img2=on.nifti(np.zeros(SHAPE[:2], np.int16)))),
    "rgb nifti": (
        "RGB or complex",
        lambda on: on.args(img2=on.nifti(np.zeros(SHAPE, [(c, "u1") for c in "RGB"]))),
    ),
    "microns": (
        "in micron",
        lambda on: on.args(img2=on.nifti(change=lambda h: h.set_xyzt_units("micron"))),
    ),
    "unknown unit": ("damaged or not NIfTI", unknown_unit),
    "no affine": ("singular", rows_of_zeros),
    "truncated nii.gz": ("damaged or not NIfTI", lambda on: on.cut(on.mri, 20000)),
    "truncated nii": ("damaged", lambda on: on.cut(on.good(), 5000)),
    "truncated mha": ("truncated or damaged", lambda on: on.cut(on.good("mha"), 5000)),
    "text nrrd": ("damaged or not .nrrd", lambda on: on.args(img2=on.text("a.nrrd"))),
    "empty nii": ("damaged or not NIfTI", lambda on: on.cut(on.mri, 0)),
    # headers that claim what their file cannot hold
    "huge nii": ("claims 20000x20000x20000 voxels", lambda on: lying_nifti(on, (20000,) * 3)),
    "huge nii.gz": ("more than its", lambda on: lying_nifti(on, (20000,) * 3, pack=True)),
    "negative nii": ("at least one along each", lambda on: lying_nifti(on, (24, -28, 20))),
    "huge mha": ("claims 20000x20000x20000", lambda on: lying_text(on, "mha", b"20000 " * 3)),
    "huge nrrd": ("claims 20000x20000x20000", lambda on: lying_text(on, "nrrd", b"20000 " * 3)),
    "many frames": ("claims 99999999x28x24 voxels", lying_enhanced),
    "huge dicom": ("claims 1x65535x24 voxels", lambda on: on.changed("Rows", 65535)),
    "nan": ("2 voxels are NaN or infinite, the first at (3, 4, 5)", not_finite),
    "constant": (
        "nothing to fuse",
        lambda on: on.args(img1=on.good(), img2=on.nifti(np.ones(SHAPE, np.int16))),
    ),
    "thin": (
        "--axis",
        lambda on: on.args(*OFF, "--axis", "coronal", img1=on.nifti(DATA[..., :12])),
    ),
    "image": ("not a DICOM image", png_source),
    "missing file": ("no such file", lambda on: on.args(img2=on.path / "no.nii")),
    # settings
    "out png": ("ends in .nii.gz", lambda on: on.args("--out", on.path / "f.png")),
    "out is a source": ("is a source", lambda on: on.args("--out", on.ct)),
    "png in a source": (
        "is inside of a source, choose another --png",
        lambda on: on.args("--png", on.dicom / "png", img2=on.series()),
    ),
    "series of nifti": ("--series1 is for DICOM", lambda on: on.args("--series1", "1")),
    "window": ("window is 'lung'", lambda on: on.args("--window", "lung")),
    "colour of ct": ("--colour is for PET", lambda on: on.args("--colour", "hot")),
    "tile": ("tile is 40", lambda on: on.args("--tile", "40")),
    "overlap": ("overlap 20", lambda on: on.args("--tile", "32", "--overlap", "20")),
    "mosaic": ("ends in .png", lambda on: on.args("--mosaic", on.path / "m.jpg")),
    "stretch": (
        "--stretch is for the test split and two folders and one pair of images",
        lambda on: on.args("--stretch"),
    ),
    "all": ("need to know what img1 is", lambda on: on.plain("--task", "all")),
    "flag of volumes": ("--tile is for volumes", png_sources),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_bad_input_is_one_line_and_writes_nothing(call, brighter, heads, tmp_path, kind):
    message, make = SPOILT[kind]
    argv = make(Inputs(tmp_path, heads))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = call(*argv)
    lines = [line for line in err.splitlines() if "slice/s" not in line]
    assert code == 2 and message in lines[-1] and len(lines) == 1, err
    assert SECRET not in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "what", "words"),
    [
        ("frames", "space", "img1 and img2 have different DICOM"),
        ("under half", "overlap", "img1 and img2 share only"),
        ("no place", "place", "img2 does not say"),
        ("wrong modality", "modality", "its modality is MR"),
    ],
)
@pytest.mark.usefixtures("brighter")
def test_force_names_what_it_forces(call, heads, tmp_path, kind, what, words):
    argv = [*SPOILT[kind][1](Inputs(tmp_path, heads)), "--force"]
    names = {"space", "overlap", "place", "modality", "registration"} - {what}
    code, _, err = call(*argv, ",".join(names))
    assert code == 2 and words in err and f"--force {what}" in err, "the others do not help"
    assert not (tmp_path / "out").exists()
    for force in ((), (what,)) if kind in ("frames", "under half") else ((),):
        code, stdout, err = call(*argv, *force)
        assert code == 0 and f"forced ({what}): {words}" in stdout, err
        assert (tmp_path / "out" / "f.nii.gz").exists()


def test_force_knows_its_names(call, brighter, heads, tmp_path):
    code, _, err = call(*Inputs(tmp_path, heads).args("--force", "overlap,hurry"))
    assert code == 2 and "--force names 'hurry', expected all, or of modality, space" in err


def test_nan_to_zero_goes_on_and_says_so(call, brighter, heads, tmp_path):
    argv = not_finite(Inputs(tmp_path, heads))
    argv += [*OFF, "--nan-to-zero", "--force", "overlap"]
    code, stdout, err = call(*argv)
    assert code == 0 and "2 voxels are NaN or infinite" in stdout and "taken as 0" in stdout, err


META = b"NDims = 3\nDimSize = 16 16 16\nElementType = MET_SHORT\n"
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 16 16 16\nencoding: raw\nendian: little\n"
TWO_WAYS = {  # headers that ITK reads in another way than our check: secret.raw in place of zeros
    "colon.mha": META + b"ElementDataFile: secret.raw\nElementDataFile = LOCAL\n",
    "both.mha": META + b"ElementDataFile := secret.raw\nElementDataFile = LOCAL\n",
    "broken.mha": META + b"ElementDataFile \n= secret.raw\nElementDataFile = LOCAL\n",
    "return.nrrd": NRRD + b"content: a\rdata file: secret.raw\n\n",
}


@pytest.mark.parametrize("name", TWO_WAYS)
def test_a_header_that_can_be_read_in_two_ways_is_refused(tmp_path, name):
    """Else it could name a file that `--inside` and the fingerprint of a case do not know of."""
    (tmp_path / "secret.raw").write_bytes(np.full(4096, 77, np.int16).tobytes())
    (tmp_path / name).write_bytes(TWO_WAYS[name] + bytes(9000))
    with pytest.raises(UserError, match="damaged or not"):
        read_volume(tmp_path / name)


def test_a_file_that_a_list_names_must_be_there(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(512))
    names = b"a.raw\n" * 15 + b"gone.raw\n"
    (tmp_path / "a.mhd").write_bytes(META + b"ElementDataFile = LIST\n" + names)
    with pytest.raises(UserError, match="file that should have its voxels is not there"):
        read_volume(tmp_path / "a.mhd")
