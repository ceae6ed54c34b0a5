"""study.py: finding cases, fusing each once, and the report; workers die in test_study_workers."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import write_series
from study_files import AFFINE, draw_pair, rows_of, write_study, write_table, write_volume, written
from task_files import files, write_task

pytest.importorskip("distributed", reason="needs requirements-study.txt")
import limits
import study
import test_asfe
import volumes
from args_setting import VERSION, StudyArgs, TestArgs, shipped_path
from cli import Runtime, UserError, file_hash, parse_args
from images import write_png
from phantom import phantom_pair
from studies import run
from studies.cases import Case
from studies.memory import USABLE, bytes_of_case
from studies.report import write_report
from volumes import request_from
from volumes.requests import Levels
from weights import Trained, load_weights, save_weights

SHIPPED = file_hash(shipped_path("compact", "CT-MRI"))


@pytest.fixture
def call(in_process):
    """Run study.py in this process."""
    return lambda *argv: in_process(study, lambda: parse_args(StudyArgs), *argv)


@pytest.fixture
def table(tmp_path):
    """A table of four volumes, three of them broken."""
    return write_study(tmp_path / "in", 4)[0]


@pytest.fixture
def brighter(monkeypatch):
    """The brighter source in place of the network of a worker."""
    from volume_files import Brighter

    monkeypatch.setattr(run, "network", lambda *_: Brighter())


def cases_of(out, **given) -> list[Case]:
    return study.cases_of(StudyArgs(out=out, **given))[1]


def with_levels(case: Case, **levels) -> Case:
    """The case with other levels."""
    levels = replace(case.request.levels, **levels)
    return replace(case, request=replace(case.request, levels=levels))


# --- finding cases ---------------------------------------------------------------------------


GOOD = "ct00.nii.gz,mri00.nii.gz"
BAD_TABLES = {
    "img1,mri\n{in}/ct00.nii.gz,x\n": "column img2 is missing, it has img1, mri",
    "img1,img2,windw\nct00.nii.gz,mri00.nii.gz,bone\n": "column 'windw' is no setting of a case",
    "img1,img2,img2\na,b,c\n": "column 'img2' is there twice",
    "img1,img2\n": "has no cases",
    "img1,img2\nct00.nii.gz\n": "line 2: has 1 cells, expected 2",
    "img1,img2\nct00.nii.gz,\n": "line 2: img2 is empty",
    "img1,img2\nct00.nii.gz,gone.nii.gz\n": "gone.nii.gz: no such file or folder",
    "img1;img2;task\nct00.nii.gz;mri00.nii.gz;MR\n": "task is 'MR', expected one of CT-MRI",
    "img1,img2,tile\nct00.nii.gz,mri00.nii.gz,big\n": "line 2: tile is 'big', expected a number",
    "img1,img2,tile\nct00.nii.gz,mri00.nii.gz,-1\n": "tile is -1, expected at least 0",
    "img1,img2,nan_to_zero\nct00.nii.gz,mri00.nii.gz,2\n": "expected yes or no",
    f"img1,img2\n{GOOD}\n\n{GOOD}\n": "two cases are called ct00",
    "img1,img2,name\nct00.nii.gz,mri00.nii.gz,../x\n": "cannot be a file's name",
    "img1,img2,name\nct00.nii.gz,mri00.nii.gz,a\nct00.nii.gz,mri00.nii.gz,A\n": "are called A",
    "img1,img2\n../outside/ct00.nii.gz,mri00.nii.gz\n": "--inside forbids",
    "img1,img2,weights\nct00.nii.gz,mri00.nii.gz,mri00.nii.gz\n": "weights",
}


@pytest.mark.parametrize("text", BAD_TABLES, ids=BAD_TABLES.values())
def test_a_bad_table_is_one_line_and_nothing_runs(call, table, text, monkeypatch):
    monkeypatch.setattr(study, "workers", lambda *_: pytest.fail("it started"))
    table.write_text(text)
    write_volume(table.parent.parent / "outside" / "ct00.nii.gz", draw_pair(0)[0])
    out = table.parent.parent / "out"
    code, _, err = call(table, "--out", out, "--inside")
    assert code == 2 and err.startswith("study.py: error: ") and err.count("\n") == 1
    assert BAD_TABLES[text] in err
    assert not out.exists()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--out", "o"], "give a table, or --bids, or --dir1 with --dir2"),
        (["TABLE"], "--out is missing"),
        (["gone.csv", "--out", "o"], "gone.csv"),
        (["--dir1", "gone", "--dir2", "gone", "--out", "o"], "gone: no such folder"),
        (["TABLE", "--out", "o", "--mosaic", "m.png"], "writes one for each volume"),
        (
            ["TABLE", "--out", "o", "--stretch"],
            "--stretch is for one pair of images, but this fuses volumes",
        ),
        (["TABLE", "--out", "o", "--scheduler", "x", "--scheduler-file", "y"], "not both"),
        (["TABLE", "--out", "o", "--scheduler", "x", "--jobs", "2"], "are for this machine"),
        (["TABLE", "--out", "o", "--scheduler-file", "gone.json"], "gone.json: no such file"),
    ],
)
def test_wrong_flags_are_one_line(call, table, argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*(table if word == "TABLE" else word for word in argv))
    assert code == 2 and expected in err and err.count("\n") == 1
    assert not files(tmp_path) & {"o/report.csv", "o/report.html"}


def test_a_flag_counts_for_the_cases_that_have_a_use_for_it(table, tmp_path):
    pair = "ct00.nii.gz,mri00.nii.gz"
    table.write_text(f"img1,img2,task,name\n{pair},CT-MRI,a\n{pair},PET-MRI,b\n")
    one, two = cases_of(tmp_path / "o", table=table, suv=5, window="brain")
    assert one.request.levels == Levels("brain") and two.request.levels == Levels(suv=5)
    for given, message in (
        ({"overlap": 32}, "--overlap is for --tile, which is not given"),
        ({"stretch": True}, "--stretch is for one pair of images, but this fuses volumes"),
    ):
        with pytest.raises(UserError, match=message):
            cases_of(tmp_path / "o", table=table, **given)
    with pytest.raises(UserError, match="--suv is for PET-MRI, but the task is SPECT-MRI"):
        table.write_text(f"img1,img2,task\n{pair},SPECT-MRI\n")
        cases_of(tmp_path / "o", table=table, suv=5)
    table.write_text(f"img1,img2,task,suv,name\n{pair},PET-MRI,5,a\n{pair},CT-MRI,5,b\n")
    with pytest.raises(UserError, match="b: suv is for PET-MRI, but the task is CT-MRI"):
        cases_of(tmp_path / "o", table=table)


def test_a_row_wins_over_the_settings_of_the_study(table, tmp_path):
    text = "\ufeffimg1\timg2\ttask\twindow\tnan_to_zero\nct00.nii.gz\tmri00.nii.gz\t\tbone\tYes\n"
    table.write_text(text, encoding="utf-8")
    png = tmp_path / "slices"
    (case,) = cases_of(tmp_path / "o", table=table, window="brain", axis="sagittal", png=png)
    request = case.request
    assert (request.levels.window, request.slicing.axis) == ("bone", "sagittal")
    assert request.source1.nan_to_zero and request.source2.nan_to_zero
    assert request.source1.path == table.parent / "ct00.nii.gz" and request.task == "CT-MRI"
    assert request.writing.out == tmp_path / "o" / "ct00.nii.gz"
    assert request.writing.png == png / "ct00"
    assert Case.unpacked(case.packed()) == case


def test_two_folders_of_images_or_volumes(tmp_path):
    for side, names in (("1", ("a.nii.gz", "b.png")), ("2", ("a.nii", "b.tif", "c.png"))):
        for name in names:
            path = tmp_path / side / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
    dirs = {"dir1": tmp_path / "1", "dir2": tmp_path / "2"}
    with pytest.raises(UserError, match=r"c is in .*2 but not in .*1; --skip-unmatched"):
        cases_of(tmp_path / "o", **dirs)
    cases = cases_of(tmp_path / "o", **dirs, skip_unmatched=True)
    assert [case.request.plan().outputs[0].path.name for case in cases] == ["a.nii.gz", "b.png"]
    with pytest.raises(UserError, match="is a source"):
        cases_of(tmp_path / "1", **dirs, skip_unmatched=True)
    (tmp_path / "1" / "a.png").touch()
    with pytest.raises(UserError, match=r"both a\.nii\.gz and a\.png"):
        cases_of(tmp_path / "o", **dirs)


def test_files_of_two_cases_may_not_meet(table, tmp_path):
    rows = [{"img1": "ct00.nii.gz", "img2": "mri00.nii.gz", "name": "a"}]
    for name in ("1.png", "2.png"):
        write_png(table.parent / name, np.zeros((32, 32), np.uint8))
    rows.append({"img1": "1.png", "img2": "2.png", "name": "a_mosaic"})
    write_table(table, rows)
    with pytest.raises(UserError, match=r"a_mosaic\.png would be written by a and by a_mosaic"):
        cases_of(tmp_path / "o", table=table)


def test_what_is_left_out_is_said_and_in_the_report(call, tmp_path, monkeypatch):
    """Of two folders, and of a BIDS folder."""
    monkeypatch.setattr(study, "workers", lambda *_: nullcontext())
    monkeypatch.setattr(study, "fuse_all", lambda *_: None)
    for name in ("1/a.png", "2/a.png", "2/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, np.zeros((32, 32), np.uint8))
    for name in ("sub-1_ct", "sub-1_T1w", "sub-2_ct"):
        write_volume(tmp_path / "bids" / name[:5] / f"{name}.nii.gz", draw_pair(0)[0])
    ways = {
        "b: left out, without a partner": ("--dir1", tmp_path / "1", "--dir2", tmp_path / "2"),
        "sub-2/sub-2_ct.nii.gz: left out, its subject has": ("--bids", tmp_path / "bids"),
    }
    for line, argv in ways.items():
        skip = ["--skip-unmatched"] if "--dir1" in argv else []
        code, out, err = call(*argv, *skip, "--out", tmp_path / "o")
        assert code == 0 and line in out, err
        assert f"<li>{line}" in (tmp_path / "o" / "report.html").read_text()


META = "NDims = 3\nDimSize = 16 16 16\nElementType = MET_SHORT\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 16 16 16\nencoding: raw\nendian: little\n"
HEADERS = {  # that name ../outside/secret.raw, each in its own way
    "plain.mhd": f"{META}ElementDataFile = ../outside/secret.raw\n",
    "whole.mha": f"{META}ElementDataFile = OUTSIDE/secret.raw\n",
    "list.mhd": f"{META}ElementDataFile = LIST\n../outside/secret.raw\n",
    "pattern.mhd": f"{META}ElementDataFile = ../outside/s%dcret.raw 0 0 1\n",
    "indented.mhd": f"{META}   ElementDataFile = ../outside/secret.raw\n",
    "plain.nhdr": f"{NRRD}data file: ../outside/secret.raw\n",
    "other.nrrd": f"{NRRD}datafile: OUTSIDE/secret.raw\n",
    "upper.nhdr": f"{NRRD}DATA FILE: ../outside/secret.raw\n",
    "list.nhdr": f"{NRRD}data file: LIST 3\n../outside/secret.raw\n",
    "half.nhdr": f"{NRRD}data file: LIST 3\nct00.nii.gz\n../outside/secret.raw\n",
}


def draw_outside(table) -> Path:
    """A folder beside the table's with what --inside forbids."""
    outside = table.parent.parent / "outside"
    outside.mkdir()
    values = np.full((16, 16, 16), 77, np.int16)
    (outside / "secret.raw").write_bytes(values.tobytes())
    (outside / "s0cret.raw").write_bytes(values.tobytes())
    nib.Nifti1Pair(values, AFFINE).to_filename(outside / "pair.img")
    nib.Nifti1Image(values, AFFINE).to_filename(outside / "ct.nii.gz")
    (outside / "ct.json").write_text("{}")
    (outside / "series").mkdir()
    (outside / "series" / "1.dcm").write_bytes(bytes(200))
    return outside


def inside_line(table, cell: str, column: str = "img1") -> str:
    """The error of a table with one such cell under --inside."""
    row = {"img1": "ct00.nii.gz", "img2": "mri00.nii.gz", "name": "a"} | {column: cell}
    with pytest.raises(UserError) as caught:
        cases_of(table.parent.parent / "o", table=write_table(table, [row]), inside=True)
    return str(caught.value)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_does_not_lead_out_of_the_folder(table, name):
    outside = draw_outside(table)
    text = HEADERS[name].replace("OUTSIDE", str(outside))
    (table.parent / name).write_bytes(text.encode() + (b"" if "NRRD" in text else bytes(9000)))
    line = inside_line(table, name)
    assert "for which" in line and "cret.raw is read: --inside forbids it" in line


@pytest.mark.parametrize(
    ("link", "target", "cell"),
    [
        ("a.nii.gz", "ct.nii.gz", "a.nii.gz"),
        ("folder", ".", "folder/ct.nii.gz"),
        ("folder", "series", "folder"),
        ("dicom/2.dcm", "series/1.dcm", "dicom"),
        ("dicom/deep/2.dcm", "series/1.dcm", "dicom"),
        ("own.img", "pair.img", "own.hdr"),
        ("own.json", "ct.json", "own.hdr"),
        ("own.mat", "ct.json", "own.hdr"),
        ("ct00.json", "ct.json", "ct00.nii.gz"),
        ("circle", "../in/circle", "circle"),
        ("nowhere.nii", "nowhere.nii", "nowhere.nii"),
    ],
)
def test_a_link_does_not_lead_out_of_the_folder(table, link, target, cell):
    outside = draw_outside(table)
    (table.parent / "dicom" / "deep").mkdir(parents=True)
    (table.parent / "dicom" / "1.dcm").write_bytes(bytes(200))
    nib.Nifti1Pair(draw_pair(0)[0], AFFINE).to_filename(table.parent / "own.img")
    if (table.parent / link).exists():
        (table.parent / link).unlink()
    (table.parent / link).symlink_to(outside / target)
    assert "--inside forbids" in inside_line(table, cell)
    for column in ("via", "labels", "register", "weights"):
        row = {"task": "PET-MRI"} if column == "via" else {}
        if not (table.parent / cell).is_file() and column == "register":
            continue  # then it is a word
        rows = [{"img1": "ct01.nii.gz", "img2": "mri00.nii.gz", "name": "a", column: cell} | row]
        with pytest.raises(UserError, match="--inside forbids"):
            cases_of(table.parent.parent / "o", table=write_table(table, rows), inside=True)


def test_whether_a_file_outside_is_there_is_not_told(table):
    draw_outside(table)
    for name in ("ct.nii.gz", "gone.nii.gz"):
        assert inside_line(table, f"../outside/{name}").endswith("which --inside forbids")
    for column in ("dicom", "moved", "transform"):
        assert inside_line(table, "../outside/new.nii.gz", column).endswith("--inside forbids")


def test_what_lies_inside_is_taken_through_headers_and_links(table):
    (table.parent / "deep").mkdir()
    (table.parent / "deep" / "own.raw").write_bytes(np.full(4096, 7, np.int16).tobytes())
    (table.parent / "own.mhd").write_text(f"{META}ElementDataFile = deep/own.raw\n")
    (table.parent / "link.mhd").symlink_to("own.mhd")
    for name in ("own.mhd", "link.mhd"):
        rows = [{"img1": name, "img2": "mri00.nii.gz", "name": "a"}]
        assert cases_of(table.parent.parent / "o", table=write_table(table, rows), inside=True)


# --- one case --------------------------------------------------------------------------------


def test_a_case_is_what_test_asfe_makes_of_it(table, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"1001": 32}) / "CT-MRI" / "test"
    volume = cases_of(tmp_path / "a", table=table)[0]
    (image,) = cases_of(tmp_path / "a", dir1=data / "CT", dir2=data / "MRI")
    run.NETWORKS.clear()
    for case in (volume, image):
        record = run.run_case(case.packed())
        assert record["status"] == "done"
        assert (record["software"], record["version"]) == ("ASFE-Fusion", VERSION)
        assert record["weights_sha256"] == SHIPPED
    assert len(run.NETWORKS) == 1, "loaded once"
    told = json.loads((tmp_path / "a" / "c00.json").read_text())
    assert told["weights_sha256"] == SHIPPED and told["version"] == VERSION
    sources = {"img1": table.parent / "ct00.nii.gz", "img2": table.parent / "mri00.nii.gz"}
    files = {"out": tmp_path / "b" / "c00.nii.gz", "mosaic": tmp_path / "b" / "c00_mosaic.png"}
    test_asfe.main(TestArgs(register="off", **sources, **files))
    sources = {"img1": data / "CT" / "1001.png", "img2": data / "MRI" / "1001.png"}
    test_asfe.main(TestArgs(out=tmp_path / "b" / "1001.png", **sources))
    names = {"c00.nii.gz", "c00.json", "c00_mosaic.png", "1001.png"}
    assert names <= written(tmp_path / "a").keys()
    assert written(tmp_path / "a") == written(tmp_path / "b")


def fused_again(case: Case) -> bool:
    """Whether a case was not done before; it is done after."""
    record = run.run_case(case.packed())
    assert record["status"] == "done", record["message"]
    return not record["again"]


def test_what_is_done_is_not_done_again(table, tmp_path, brighter):
    folders = {flag: tmp_path / "o" / flag for flag in ("png", "moved")}
    case = cases_of(tmp_path / "o", table=table, **folders)[0]
    assert fused_again(case) and not fused_again(case)
    assert not fused_again(replace(case, runtime=Runtime("cpu", 1)))
    other = with_levels(case, window="bone")
    assert fused_again(other) and not fused_again(other) and fused_again(case)
    write_volume(case.request.source2.path, draw_pair(7)[1])
    assert fused_again(case) and not fused_again(case)
    for name in (
        "c00.nii.gz",
        "c00_mosaic.png",
        "c00.json",
        "png/c00/axial_0001.png",
        "moved/c00.nii.gz",
    ):
        path = tmp_path / "o" / name
        path.write_bytes(path.read_bytes()[:-1])
        assert fused_again(case) and not fused_again(case), name
    case.record.write_text("{")
    assert fused_again(case) and not fused_again(case)


def test_a_record_has_what_was_written(table, tmp_path, brighter):
    """Also the files of a DICOM series, by a flag or a column, and once more after a change."""
    pytest.importorskip("highdicom", reason="needs requirements-volumes.txt")
    (case, *_) = cases_of(tmp_path / "o", table=table, dicom=tmp_path / "o" / "dicom")
    assert fused_again(case) and not fused_again(case)
    outputs = json.loads(case.record.read_text())["outputs"]
    assert {f"../dicom/c00/axial_000{n}.dcm" for n in (1, 2)} < outputs.keys()
    assert fused_again(with_levels(case, window="bone")), "its own files are replaced"
    rows = [{"img1": "ct00.nii.gz", "img2": "mri00.nii.gz", "name": "c", "dicom": "series"}]
    (case,) = cases_of(tmp_path / "p", table=write_table(table, rows), register="off")
    assert fused_again(case) and len(files(table.parent / "series")) == 2
    rows.append(rows[0] | {"name": "d"})
    with pytest.raises(UserError, match="series would be written by c and by d"):
        cases_of(tmp_path / "p", table=write_table(table, rows))


def test_a_registered_image_is_recorded_with_its_files(tmp_path, brighter):
    ct, mri = phantom_pair("CT-MRI")
    for name, image in (("ct", ct), ("mri", np.roll(mri, 5, 1))):
        write_png(tmp_path / f"{name}.png", image)
    rows = [{"img1": "ct.png", "img2": "mri.png", "name": "a", "register": "rigid"}]
    (case,) = cases_of(tmp_path / "o", table=write_table(tmp_path / "t.csv", rows))
    assert fused_again(case) and not fused_again(case)
    record = json.loads(case.record.read_text())
    ends = (".png", "_img2.png", ".tfm", "_registration.png", ".json")
    assert record["outputs"].keys() == {f"../a{end}" for end in ends}
    assert record["found"]["apart_pixels"] == pytest.approx(5, abs=0.5)
    (tmp_path / "o" / "a.tfm").write_text("")
    assert fused_again(case)
    rows.append({"img1": "ct.png", "img2": "mri.png", "name": "a_img2"})
    with pytest.raises(UserError, match=r"a_img2\.png would be written by a and by a_img2"):
        cases_of(tmp_path / "o", table=write_table(tmp_path / "t.csv", rows))


def test_a_file_that_a_header_names_counts(table, tmp_path, brighter):
    """The second file of a pair is in no setting, but it was read."""
    ct, mri = draw_pair(0)
    nib.Nifti1Pair(ct, AFFINE).to_filename(table.parent / "ct.img")
    image = sitk.GetImageFromArray(mri.T)
    image.SetSpacing((4, 4, 5))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # ITK counts in LPS
    sitk.WriteImage(image, str(table.parent / "mri.mhd"))
    rows = [{"img1": "ct.hdr", "img2": "mri.mhd", "name": "a", "force": "all", "register": "off"}]
    (case,) = cases_of(tmp_path / "o", table=write_table(table, rows))
    assert fused_again(case) and not fused_again(case)
    for name in ("ct.img", "mri.raw"):
        path = table.parent / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data)
        assert fused_again(case) and not fused_again(case), name


def test_new_weights_in_an_old_file_are_taken(table, tmp_path):
    """A worker that lives on has the old ones in memory."""
    path = tmp_path / "w.safetensors"
    model, metadata = load_weights(run.weights_path(Trained(), "CT-MRI"))
    save_weights(model, path, metadata)
    case = cases_of(tmp_path / "o", table=table, weights=path)[0]
    assert fused_again(case) and not fused_again(case)
    before = (tmp_path / "o" / "c00.nii.gz").read_bytes()
    model.decoder.outlayer.bias.data += 0.5
    stat = path.stat()
    save_weights(model, path, metadata)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the clock does not tell
    assert fused_again(case)
    assert (tmp_path / "o" / "c00.nii.gz").read_bytes() != before


def test_a_case_that_is_stopped_starts_again(table, tmp_path, brighter, monkeypatch):
    case = cases_of(tmp_path / "o", table=table)[0]
    run.run_case(case.packed())
    changed = with_levels(case, window="bone")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(volumes, "fuse_volumes", stopped)
        run.run_case(changed.packed())
    assert not run.run_case(case.packed())["again"], "its outputs may have been half replaced"


def test_a_case_that_fails_is_written_down(table, tmp_path, brighter, monkeypatch):
    cases = cases_of(tmp_path / "o", table=table)
    lines = [run.run_case(case.packed())["message"] for case in cases]
    assert lines[0] == "" and all(lines[1:]) and not any("\n" in line for line in lines)
    assert "mri01" in lines[1] and "ct02" in lines[2] and "1 voxels are NaN" in lines[3]
    assert json.loads(cases[1].record.read_text())["status"] == "failed"
    assert set(written(tmp_path / "o")) == {"c00.nii.gz", "c00.json", "c00_mosaic.png"}
    monkeypatch.setattr(run, "fuse", lambda *_: 1 / 0)
    record = run.run_case(cases[1].packed())
    assert record["message"] == "ZeroDivisionError: division by zero"
    assert "in run_case" in json.loads(cases[1].record.read_text())["traceback"]


# --- memory ----------------------------------------------------------------------------------


def test_fewer_run_at_once_where_the_largest_case_needs_more(tmp_path, monkeypatch, capsys):
    """One line names the case; what the user gave stays."""
    for name in ("1/a.png", "2/a.png", "1/b.png", "2/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        side = 2048 if name.endswith("b.png") else 32
        write_png(tmp_path / name, np.zeros((side, side), np.uint8))
    monkeypatch.setattr(limits, "free_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(limits, "granted_cores", lambda: 8)
    given = {"dir1": tmp_path / "1", "dir2": tmp_path / "2", "out": tmp_path / "o"}
    args, jobs = study.shares(StudyArgs(**given))
    cases = study.cases_of(args)[1]
    assert jobs == 4 and [bytes_of_case(case) // 10**9 for case in cases] == [0, 5]
    args, jobs, cases = study.with_room(args, jobs, cases, 0)
    line = "2 at a time in place of 4, as b needs about 5.7 GB and 16.0 GB are free\n"
    assert capsys.readouterr().out == line
    assert (jobs, args.memory, args.threads) == (2, 8, 4)
    assert {case.runtime.threads for case in cases} == {4}
    monkeypatch.setattr(study, "workers", lambda args, jobs: nullcontext(jobs))
    seen = []
    monkeypatch.setattr(study, "fuse_all", lambda jobs, *_: seen.append(jobs))
    for own, expected in (({}, 2), ({"jobs": 4}, 4), ({"memory": 4}, 4)):
        study.main(StudyArgs(**given, **own))
        assert seen.pop() == expected


def test_the_need_of_volumes_comes_from_their_headers(table, tmp_path):
    """Of each format; and what cannot be read needs nothing, as it will fail."""
    shape = (64, 48, 40)
    ct, voxels = np.zeros(shape, np.int16), 64 * 48 * 40
    image = sitk.GetImageFromArray(ct.T)
    for name in ("ct.mha", "ct.nrrd"):
        sitk.WriteImage(image, str(table.parent / name))
    nib.Nifti1Pair(ct, AFFINE).to_filename(table.parent / "ct.img")
    write_volume(table.parent / "ct.nii.gz", ct)
    write_series(table.parent / "dicom", ct, AFFINE, "CT")
    pairs = [("ct.mha", "ct.nrrd"), ("ct.hdr", "ct.nii.gz"), ("dicom", "ct.nii.gz")]
    pairs += [("mri01.nii.gz", "ct.nii.gz")]
    rows = [{"img1": a, "img2": b, "name": f"c{n}"} for n, (a, b) in enumerate(pairs)]
    cases = cases_of(tmp_path / "o", table=write_table(table, rows))
    *told, broken = [bytes_of_case(case) for case in cases]
    held = limits.BYTES_OF_PROCESS["compact"]
    exact = held + voxels * (2 * limits.BYTES_OF_VOXEL + limits.BYTES_ON_GRID) + 64 * 48 * 1200
    assert told[0] == told[1] == exact and broken == 0
    assert exact < told[2] < exact + 4 * 10**8, "by the bytes of the files, and slices of 512"


def test_a_case_takes_tiles_in_a_small_share(tmp_path, monkeypatch):
    """Its record and the report say so; the share counts what the process holds already."""
    for name, image in zip(("1/a.png", "2/a.png"), phantom_pair("CT-MRI", 512), strict=True):
        (tmp_path / name).parent.mkdir()
        write_png(tmp_path / name, image)
    (case,) = cases_of(tmp_path / "o", dir1=tmp_path / "1", dir2=tmp_path / "2", DEVICE="cpu")
    monkeypatch.setattr(limits.Share, "most", 0)
    monkeypatch.setattr(limits, "resident", lambda root: 10**9)
    record = run.run_case(case.packed(), int(1.2e9 / USABLE))
    [note] = record["found"]["notes"]
    assert "a pair of 512x512 pixels needs about 315 MB and 200 MB are free" in note
    assert "fused in tiles of 256 pixels" in note
    page = write_report(tmp_path / "o", [case], {"a": record}).read_text()
    assert f"<p>{note}</p>" in page
    tight = run.run_case(case.packed(), int(1.05e9 / USABLE))
    assert tight["again"], "what is done is done, however little memory there is"
    case.record.unlink()
    tight = run.run_case(case.packed(), int(1.05e9 / USABLE))
    assert tight["status"] == "failed" and "50 MB are free; end other" in tight["message"]


# --- the report ------------------------------------------------------------------------------


def test_report_has_failures_on_top_and_needs_nothing_else(tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    cases = []
    for name in ("calm", "fine", "bad", "left"):
        words = {"task": "CT-MRI", "img1": out / "ct.nii", "img2": out / "mri.nii"}
        words |= {"out": out / f"{name}.nii.gz", "mosaic": out / f"{name}_mosaic.png"}
        record = out / ".study" / f"{name}.json"
        cases.append(Case(name, request_from(words), Trained(), Runtime(), record))
    for end in ("mosaic", "registration"):
        write_png(out / f"fine_{end}.png", np.full((300, 1200, 3), 90, np.uint8))
    told = {"report": ["it covers 12% of the grid"], "registration": {"moved_mm": 99}}
    (out / "fine.json").write_text(json.dumps(told))  # the fields count, whatever it says
    found = {"apart_mm": 3.456, "coverage": 0.871, "doubts": ["large <turn>"]}
    files = {f"../fine_{end}.png": "" for end in ("mosaic", "registration")}
    records = {
        "calm": {"status": "done", "message": "", "seconds": 1.0},
        "fine": {"status": "done", "message": "", "seconds": 4.2, "found": found, "outputs": files},
        "bad": {"status": "failed", "message": "no <volume>", "seconds": 0.1},
    }
    left = ["sub-1/<a>_T1w.nii: left out, no CT or PET goes with it"]
    page = write_report(out, cases, records, left).read_text()
    assert f"<li>{left[0].replace('<a>', '&lt;a&gt;')}</li>" in page
    rows = rows_of(out)
    assert list(rows) == ["bad", "left", "fine", "calm"] and rows["left"]["status"] == "not run"
    assert (rows["fine"]["moved_mm"], rows["fine"]["coverage_percent"]) == ("3.46", "87")
    assert page.index("no &lt;volume&gt;") < page.index("moved 3.46 mm")
    assert page.index("large &lt;turn&gt;") < page.index('id="fine"') < page.index('id="calm"')
    assert "Not run: left" in page
    assert "coverage 87 %" in page and "large &lt;turn&gt;" in page and "4.2 s" in page
    assert page.count("data:image/jpeg;base64,") == 2 and "2 done, 1 failed, 1 not run" in page
    assert "http" not in page and "<script" not in page and 'href="fine.nii.gz"' in page
    assert len(page) < 50_000, "two small pictures"


def test_report_shows_a_pair_of_images_with_its_sources(tmp_path, brighter):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"1001": 32}) / "CT-MRI" / "test"
    cases = cases_of(tmp_path / "o", dir1=data / "CT", dir2=data / "MRI")
    (tmp_path / "o").mkdir()
    write_png(cases[0].request.out, np.zeros((32, 32), np.uint8))
    records = {"1001": {"status": "done", "message": "", "seconds": 1.0}}
    page = write_report(tmp_path / "o", cases, records).read_text()
    assert page.count("data:image/jpeg;base64,") == 1 and rows_of(tmp_path / "o")["1001"]
