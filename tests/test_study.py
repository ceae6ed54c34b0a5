"""study.py: finding cases, fusing each once, and the report; workers die in test_study_workers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from study_files import draw_pair, rows_of, write_study, write_table, write_volume, written
from task_files import files, write_task

pytest.importorskip("distributed", reason="needs requirements-study.txt")
import study
import test_asfe
from args_setting import StudyArgs, TestArgs
from cli import UserError, parse_args
from images import write_png
from studies import run
from studies.cases import Case, find_cases
from studies.report import write_report


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
    return find_cases(StudyArgs(out=out, **given))[1]


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
    "img1,img2\n../out/ct00.nii.gz,mri00.nii.gz\n": "--inside forbids",
    "img1,img2,weights\nct00.nii.gz,mri00.nii.gz,mri00.nii.gz\n": "weights",
}


@pytest.mark.parametrize("text", BAD_TABLES, ids=BAD_TABLES.values())
def test_a_bad_table_is_one_line_and_nothing_runs(call, table, text, monkeypatch):
    monkeypatch.setattr(study, "workers", lambda *_: pytest.fail("it started"))
    table.write_text(text)
    outside = table.parent.parent / "out"
    write_volume(outside / "ct00.nii.gz", draw_pair(0)[0])
    before = files(outside)
    code, _, err = call(table, "--out", outside, "--inside")
    assert code == 2 and err.startswith("study.py: error: ") and err.count("\n") == 1
    assert BAD_TABLES[text] in err
    assert files(outside) == before


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--out", "o"], "give a table, or --bids, or --dir1 with --dir2"),
        (["TABLE"], "--out is missing"),
        (["gone.csv", "--out", "o"], "gone.csv"),
        (["--dir1", "gone", "--dir2", "gone", "--out", "o"], "gone: no such folder"),
        (["TABLE", "--out", "o", "--mosaic", "m.png"], "writes one for each volume"),
        (["TABLE", "--out", "o", "--stretch"], "--stretch and --metrics are for images"),
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


def test_a_row_wins_over_the_settings_of_the_study(table, tmp_path):
    text = "\ufeffimg1\timg2\ttask\twindow\tnan_to_zero\nct00.nii.gz\tmri00.nii.gz\t\tbone\tYes\n"
    table.write_text(text, encoding="utf-8")
    png = tmp_path / "slices"
    (case,) = cases_of(tmp_path / "o", table=table, window="brain", axis="sagittal", png=png)
    settings = case.settings
    assert (settings.window, settings.axis, settings.nan_to_zero) == ("bone", "sagittal", True)
    assert settings.img1 == table.parent / "ct00.nii.gz" and settings.task == "CT-MRI"
    assert settings.out == tmp_path / "o" / "ct00.nii.gz" and settings.png == png / "ct00"
    assert Case.unpacked(case.packed()) == case


def test_every_session_of_a_bids_folder(tmp_path):
    bids = tmp_path / "bids"
    names = ("sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_pet", "sub-1/ses-a/anat/sub-1_ses-a_T1w")
    names += ("sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w", "sub-1/ses-b/anat/sub-1_ses-b_T2w")
    names += ("sub-2/ct/sub-2_ct", "sub-2/anat/sub-2_T2w", "sub-3/ct/sub-3_ct")
    names += ("derivatives/x/sub-2/ct/sub-2_ct",)
    for name in names:
        write_volume(bids / f"{name}.nii.gz", draw_pair(0)[0])
    out, cases = find_cases(StudyArgs(bids=bids))
    assert out == bids / "derivatives" / "asfe-fusion"
    pet = "sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_desc-fused{}_pet"
    assert {case.name: case.settings.task for case in cases} == {
        pet.format("T1w"): "PET-MRI",
        pet.format("run2T1w"): "PET-MRI",
        "sub-2/ct/sub-2_desc-fusedT2w_ct": "CT-MRI",
    }
    assert {case.settings.out.parent for case in cases} == {
        out / "sub-1/ses-a/pet",
        out / "sub-2/ct",
    }
    assert json.loads(study.description(bids))["DatasetType"] == "derivative"
    with pytest.raises(UserError, match="no session of a subject has"):
        find_cases(StudyArgs(bids=tmp_path))


def test_two_folders_of_images_or_volumes(tmp_path):
    for side, names in (("1", ("a.nii.gz", "b.png")), ("2", ("a.nii", "b.tif", "c.png"))):
        for name in names:
            path = tmp_path / side / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
    dirs = {"dir1": tmp_path / "1", "dir2": tmp_path / "2"}
    with pytest.raises(UserError, match=r"c is not in .*1 .*--skip-unmatched"):
        cases_of(tmp_path / "o", **dirs)
    cases = cases_of(tmp_path / "o", **dirs, skip_unmatched=True)
    assert [case.settings.out.name for case in cases] == ["a.nii.gz", "b.png"]
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


# --- one case --------------------------------------------------------------------------------


def test_a_case_is_what_test_asfe_makes_of_it(table, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"1001": 32}) / "CT-MRI" / "test"
    volume = cases_of(tmp_path / "a", table=table)[0]
    (image,) = cases_of(tmp_path / "a", dir1=data / "CT", dir2=data / "MRI")
    run.network.cache_clear()
    for case in (volume, image):
        assert run.run_case(case.packed())["status"] == "done"
        beside = {
            key: tmp_path / "b" / path.name
            for key in ("out", "mosaic")
            if (path := getattr(case.settings, key))
        }
        test_asfe.main(replace(case.settings, **beside))
    assert run.network.cache_info().misses == 1, "loaded once"
    names = {"c00.nii.gz", "c00.json", "c00_mosaic.png", "1001.png"}
    assert names <= written(tmp_path / "a").keys()
    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_what_is_done_is_not_done_again(table, tmp_path, brighter):
    case = cases_of(tmp_path / "o", table=table, png=tmp_path / "o" / "png")[0]

    def fused_again(case=case) -> bool:
        record = run.run_case(case.packed())
        assert record["status"] == "done", record["message"]
        return not record["again"]

    assert fused_again() and not fused_again()
    elsewhere = replace(case.settings, threads=1, DEVICE="cpu")
    assert not fused_again(replace(case, settings=elsewhere))
    other = replace(case, settings=replace(case.settings, window="bone"))
    assert fused_again(other) and not fused_again(other) and fused_again()
    write_volume(case.settings.img2, draw_pair(7)[1])
    assert fused_again() and not fused_again()
    for name in ("c00.nii.gz", "c00_mosaic.png", "c00.json", "png/c00/axial_0001.png"):
        path = tmp_path / "o" / name
        path.write_bytes(path.read_bytes()[:-1])
        assert fused_again() and not fused_again(), name
    case.record.write_text("{")
    assert fused_again() and not fused_again()


def test_an_input_counts_with_all_its_files(tmp_path):
    for name in ("a.mhd", "a.raw", "b.raw", "in/1.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = tmp_path / "a.mhd", tmp_path / "in"
    before = [run.tree_hash(path) for path in paths]
    (tmp_path / "b.raw").write_text("other")
    assert [run.tree_hash(path) for path in paths] == before
    (tmp_path / "a.raw").write_text("other")
    (tmp_path / "in/1.dcm").rename(tmp_path / "in/2.dcm")
    after = [run.tree_hash(path) for path in paths]
    assert after[0] != before[0] and after[1] != before[1]


def test_a_case_that_is_stopped_starts_again(table, tmp_path, brighter, monkeypatch):
    case = cases_of(tmp_path / "o", table=table)[0]
    run.run_case(case.packed())
    changed = replace(case, settings=replace(case.settings, window="bone"))

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(test_asfe, "fuse_pair_of_volumes", stopped)
        run.run_case(changed.packed())
    assert not run.run_case(case.packed())["again"], "its outputs may have been half replaced"


def test_a_case_that_fails_is_written_down(table, tmp_path, brighter, monkeypatch):
    cases = cases_of(tmp_path / "o", table=table)
    lines = [run.run_case(case.packed())["message"] for case in cases]
    assert lines[0] == "" and all(lines[1:]) and not any("\n" in line for line in lines)
    assert "mri01" in lines[1] and "ct02" in lines[2] and "1 voxels are NaN" in lines[3]
    assert json.loads(cases[1].record.read_text())["status"] == "failed"
    assert set(written(tmp_path / "o")) == {"c00.nii.gz", "c00.json", "c00_mosaic.png"}
    monkeypatch.setattr(test_asfe, "main", lambda *_: 1 / 0)
    record = run.run_case(cases[1].packed())
    assert record["message"] == "ZeroDivisionError: division by zero"
    assert "in run_case" in json.loads(cases[1].record.read_text())["traceback"]


# --- the report ------------------------------------------------------------------------------


def test_report_has_failures_on_top_and_needs_nothing_else(tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    cases = [
        Case(name, TestArgs(out=out / f"{name}.nii.gz", mosaic=out / f"{name}_mosaic.png"), out)
        for name in ("calm", "fine", "bad", "left")
    ]
    for end in ("mosaic", "registration"):
        write_png(out / f"fine_{end}.png", np.full((300, 1200, 3), 90, np.uint8))
    told = {"registration": {"moved_mm": 3.456, "doubts": ["large <turn>"]}}
    told["report"] = ["img2 was resampled; it covers 87% of it."]
    (out / "fine.json").write_text(json.dumps(told))
    records = {
        "calm": {"status": "done", "message": "", "seconds": 1.0},
        "fine": {"status": "done", "message": "", "seconds": 4.2},
        "bad": {"status": "failed", "message": "no <volume>", "seconds": 0.1},
    }
    page = write_report(out, cases, records).read_text()
    rows = rows_of(out)
    assert list(rows) == ["bad", "left", "fine", "calm"] and rows["left"]["status"] == "not run"
    assert (rows["fine"]["moved_mm"], rows["fine"]["overlap_percent"]) == ("3.46", "87")
    assert page.index("no &lt;volume&gt;") < page.index("moved 3.46 mm")
    assert page.index("large &lt;turn&gt;") < page.index('id="fine"') < page.index('id="calm"')
    assert "Not run: left" in page
    assert "overlap 87 %" in page and "large &lt;turn&gt;" in page and "4.2 s" in page
    assert page.count("data:image/jpeg;base64,") == 2 and "2 done, 1 failed, 1 not run" in page
    assert "http" not in page and "<script" not in page and 'href="fine.nii.gz"' in page
    assert len(page) < 50_000, "two small pictures"


def test_report_shows_a_pair_of_images_with_its_sources(tmp_path, brighter):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"1001": 32}) / "CT-MRI" / "test"
    cases = cases_of(tmp_path / "o", dir1=data / "CT", dir2=data / "MRI")
    (tmp_path / "o").mkdir()
    write_png(cases[0].settings.out, np.zeros((32, 32), np.uint8))
    records = {"1001": {"status": "done", "message": "", "seconds": 1.0}}
    page = write_report(tmp_path / "o", cases, records).read_text()
    assert page.count("data:image/jpeg;base64,") == 1 and rows_of(tmp_path / "o")["1001"]
