"""A BIDS folder in a study: pairs, what is left out, names, and what the validator says."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from study_files import draw_pair, write_volume

import study
from args_setting import ROOT, VERSION, StudyArgs
from cli import UserError
from studies.bids import Choice, description, find_pairs, ignored
from studies.run import run_case


def draw(bids: Path, *names: str) -> Path:
    """Volumes of these names, all of one phantom's CT."""
    for name in names:
        write_volume(bids / f"{name}.nii.gz", draw_pair(0)[0])
    return bids


def names_of(pairs) -> set[tuple[str, str]]:
    return {tuple("_".join([*image.entities, image.suffix]) for image in pair) for pair in pairs}


def test_pairs_are_of_one_session_or_unambiguous(tmp_path):
    bids = draw(
        tmp_path,
        # in one session, several
        "sub-1/ses-a/pet/sub-1_ses-a_pet",
        "sub-1/ses-a/anat/sub-1_ses-a_T1w",
        "sub-1/ses-a/anat/sub-1_ses-a_FLAIR",
        "sub-1/ses-b/anat/sub-1_ses-b_T2w",
        # a session of its own each
        "sub-2/ses-pet/pet/sub-2_ses-pet_trc-FDG_pet",
        "sub-2/ses-mri/anat/sub-2_ses-mri_T1w",
        "sub-2/ses-mri/anat/sub-2_ses-mri_part-phase_T1w",
        # the anatomy at subject level
        "sub-3/ses-1/ct/sub-3_ses-1_ct",
        "sub-3/anat/sub-3_T2w",
        # two sessions with anatomy, none of them the PET's
        "sub-4/ses-pet/pet/sub-4_ses-pet_pet",
        "sub-4/ses-x/anat/sub-4_ses-x_T1w",
        "sub-4/ses-y/anat/sub-4_ses-y_T1w",
        # without a partner
        "sub-5/ct/sub-5_ct",
        "sub-6/anat/sub-6_T1w",
        # of no interest
        "derivatives/x/sub-7/ct/sub-7_ct",
        "sub-1/ses-a/func/sub-1_ses-a_task-rest_bold",
    )
    found = find_pairs(Choice(bids))
    assert names_of(found.pairs) == {
        ("sub-1_ses-a_pet", "sub-1_ses-a_T1w"),
        ("sub-1_ses-a_pet", "sub-1_ses-a_FLAIR"),
        ("sub-2_ses-pet_trc-FDG_pet", "sub-2_ses-mri_T1w"),
        ("sub-3_ses-1_ct", "sub-3_T2w"),
    }
    left = {Path(line.split(":")[0]).name.split(".")[0]: line for line in found.left_out}
    assert set(left) == {
        "sub-1_ses-b_T2w",
        "sub-2_ses-mri_part-phase_T1w",
        "sub-4_ses-pet_pet",
        "sub-4_ses-x_T1w",
        "sub-4_ses-y_T1w",
        "sub-5_ct",
        "sub-6_T1w",
    }
    assert "part-phase is no anatomy" in left["sub-2_ses-mri_part-phase_T1w"]
    assert "ses-x, ses-y have" in left["sub-4_ses-pet_pet"]
    assert "its subject has no T1w, T2w, FLAIR" in left["sub-5_ct"]
    assert "no CT or PET goes with it" in left["sub-6_T1w"]


def test_participants_and_sessions_are_chosen_as_in_bids_apps(tmp_path):
    names = [f"sub-{s}/ses-{n}/{f}/sub-{s}_ses-{n}_{x}" for s in "12" for n in "ab"
             for f, x in (("pet", "pet"), ("anat", "T1w"))]  # fmt: skip
    bids = draw(tmp_path, *names)

    def count(**labels):
        _, cases = study.cases_of(StudyArgs(bids=bids, **labels))
        return {case.name.split("/")[0] + case.name.split("/")[1] for case in cases}

    assert count() == {"sub-1ses-a", "sub-1ses-b", "sub-2ses-a", "sub-2ses-b"}
    assert count(participant_label=("1",)) == {"sub-1ses-a", "sub-1ses-b"}
    assert count(participant_label=("sub-2",), session_label=("ses-b",)) == {"sub-2ses-b"}
    for wrong in ({"participant_label": ("9",)}, {"session_label": ("9",)}):
        with pytest.raises(UserError, match=r"has no image of s..-9 to fuse"):
            count(**wrong)
    with pytest.raises(UserError, match="are for --bids"):
        study.check_study(StudyArgs(table=tmp_path, out=tmp_path, participant_label=("1",)))


def test_names_are_those_of_derivatives(tmp_path):
    bids = draw(
        tmp_path / "bids",
        "sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_pet",
        "sub-1/ses-a/anat/sub-1_ses-a_T1w",
        "sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w",
        "sub-2/ct/sub-2_ct",
        "sub-2/anat/sub-2_T2w",
    )
    out, cases = study.cases_of(StudyArgs(bids=bids))
    assert out == bids / "derivatives" / "asfe-fusion"
    pet = "sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_space-T1w_desc-{}{}_pet"
    ct = "sub-2/ct/sub-2_space-ct_desc-fusedT2w_ct"
    assert {case.name: case.request.task for case in cases} == {
        pet.format("fused", "T1w"): "PET-MRI",
        pet.format("fused", "run2T1w"): "PET-MRI",
        ct: "CT-MRI",
    }
    by_name = {case.name: case.request.writing for case in cases}
    writing = by_name[pet.format("fused", "run2T1w")]
    assert writing.moved == out / (pet.format("coreg", "run2T1w") + ".nii.gz")
    xfm = "sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_from-pet_to-run2T1w_mode-image_xfm.txt"
    assert writing.transform == out / xfm
    assert writing.derivative == {
        "SpatialReference": "bids:raw:sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz",
        "Sources": [
            "bids:raw:sub-1/ses-a/pet/sub-1_ses-a_trc-FDG_pet.nii.gz",
            "bids:raw:sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz",
        ],
    }
    assert by_name[ct].moved == out / "sub-2/anat/sub-2_space-ct_desc-coregct_T2w.nii.gz"
    assert by_name[ct].transform.name == "sub-2_from-T2w_to-ct_mode-image_xfm.txt"
    _, cases = study.cases_of(StudyArgs(bids=bids, grid="1.5", register="off"))
    writing = next(c.request.writing for c in cases if "sub-2" in c.name)
    assert "space-ct_res-1p5mm_desc-fusedT2w_ct" in str(writing.out)
    assert writing.transform is None and writing.derivative["Resolution"] == "cubes of 1.5 mm"
    told = json.loads(description(bids, out))
    assert told["DatasetType"] == "derivative" and told["DatasetLinks"] == {"raw": "../.."}
    assert told["GeneratedBy"][0]["Version"] == VERSION
    with pytest.raises(UserError, match="no subject has"):
        study.cases_of(StudyArgs(bids=tmp_path))


def test_the_version_is_that_of_the_citation():
    assert f"version: {VERSION}" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def fused(tmp_path, monkeypatch) -> Path:
    """The derivatives of a folder with two sessions, with a stand-in for the network."""
    from volume_files import Brighter

    import studies.run

    bids = tmp_path / "bids"
    for name, side in (
        ("sub-1/ses-pet/pet/sub-1_ses-pet_pet", 40),
        ("sub-1/ses-mri/anat/sub-1_ses-mri_T1w", 48),
    ):
        i, j, k = (
            np.indices((side, side, 24)) - np.array([side / 2, side / 2, 12])[:, None, None, None]
        )
        ball = 900.0 * (i**2 + j**2 + (1.5 * k) ** 2 < 15**2) + (i % 7) * 9
        affine = np.diag([4.0, 4.0, 5.0, 1.0])
        affine[:3, 3] = -2 * side, -2 * side, -60
        path = bids / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(ball.astype(np.float32), affine).to_filename(path)
    monkeypatch.setattr(studies.run, "network", lambda *_: Brighter())
    shift = tmp_path / "t.tfm"
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3DTransform_double_3_3\n"
    shift.write_text(text + "Parameters: 0 0 0 4 0 0\nFixedParameters: 0 0 0 0\n")
    out, cases = study.cases_of(StudyArgs(bids=bids, register=str(shift), force="all"))
    for case in cases:
        record = run_case(case.packed())
        assert record["status"] == "done", record
    (out / "dataset_description.json").write_text(description(bids, out))
    (out / ".bidsignore").write_text(ignored())
    return out


def test_sidecars_say_what_bids_asks(fused):
    folder = fused / "sub-1/ses-pet/pet"
    for what in ("fused", "coreg"):
        stem = f"sub-1_ses-pet_space-T1w_desc-{what}T1w_pet"
        assert (folder / f"{stem}.nii.gz").is_file()
        told = json.loads((folder / f"{stem}.json").read_text())
        assert told["SpatialReference"] == "bids:raw:sub-1/ses-mri/anat/sub-1_ses-mri_T1w.nii.gz"
        assert told["Sources"][0] == "bids:raw:sub-1/ses-pet/pet/sub-1_ses-pet_pet.nii.gz"
        assert told["Units"] == "arbitrary"
    xfm = folder / "sub-1_ses-pet_from-pet_to-T1w_mode-image_xfm.txt"
    values = next(line for line in xfm.read_text().splitlines() if line.startswith("Parameters"))
    assert np.allclose([float(v) for v in values.split()[-3:]], [-4, 0, 0]), "T1w to PET points"


@pytest.mark.skipif(not find_spec("bids_validator_deno"), reason="needs bids-validator-deno")
def test_the_validator_finds_no_error(fused):
    program = Path(sys.executable).with_name("bids-validator-deno")
    program = program if program.is_file() else shutil.which("bids-validator-deno")
    done = subprocess.run(
        [str(program), str(fused), "--json"], capture_output=True, text=True, timeout=500
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [
        (i["code"], i.get("subCode"), i.get("location")) for i in issues if i["severity"] == "error"
    ]
    assert not errors
