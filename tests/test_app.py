"""What happens on the page of app.py, without a browser; `test_browser.py` has the rest."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
from near_child import NearChild

import limits
from args_setting import ROOT, TASKS, AppArgs, TestArgs
from cli import Runtime, UserError, parse_args, remove_left
from images import write_png
from phantom import phantom_pair
from studies.child import Child
from webpage import clicks, tab
from webpage.shared import ImageLimits, example_paths
from webpage.tab import Place

gradio = pytest.importorskip("gradio", reason="needs requirements-app.txt")

import app  # noqa: E402
import test_asfe  # noqa: E402


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> app.Page:
    folder = tmp_path_factory.mktemp("uploads")
    weights = app.weights_in(AppArgs().weights_dir)
    clicks.prepare(list(weights.values()), Runtime("cpu"), folder)
    place = Place(folder, 10, pytest.fail)
    return app.Page(gradio, place, ImageLimits(16, 200), weights, NearChild())


def pair_of_files(folder: Path, task: str = "PET-MRI", side: int = 64) -> tuple[str, str]:
    paths = [folder / f"{name}.png" for name in ("source", "mri")]
    for path, image in zip(paths, phantom_pair(task, side), strict=True):
        write_png(path, image)
    return str(paths[0]), str(paths[1])


def rgb(path: str | Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def test_the_page_fuses_as_the_script_does(page, tmp_path):
    files = pair_of_files(tmp_path)
    fused, (source, right), measuring, _, notes, made = page.fuse(
        *files, "PET-MRI", "compact_PET-MRI"
    )
    assert np.array_equal(rgb(source), phantom_pair("PET-MRI", 64)[0]) and right == fused
    assert measuring == "Measuring …" and not notes
    out = tmp_path / "script.png"
    paths = {"img1": Path(files[0]), "img2": Path(files[1]), "out": out}
    test_asfe.main(TestArgs(task="PET-MRI", **paths))
    assert np.array_equal(rgb(out), rgb(fused))
    text = page.measure(made)
    assert "| metric | fused | max | mean | source 1 | source 2 |" in text and "Qabf ↑" in text
    assert Path(fused).name == "source_mri_fused.png", "the name of a download"
    # each click has files of its own
    assert page.fuse(*files, "PET-MRI", "compact_all")[0] != fused


def test_there_are_no_figures_of_what_is_gone(page, tmp_path):
    assert page.measure(None) == "", "other images were chosen meanwhile"
    *_, made = page.fuse(*pair_of_files(tmp_path), "PET-MRI", "compact_all")
    Path(made.fused).unlink()
    text = page.measure(made)
    assert text.startswith("No figures: ") and Path(made.fused).name in text
    assert str(page.place.folder) not in text


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "mri.png: damaged or not an image, expected PNG, TIFF, JPEG or BMP"),
        ("empty", "mri.png: damaged"),
        ("truncated", "mri.png: damaged"),
        ("other size", "source.png is 64x64, mri.png is 48x48, expected equal"),
        ("too large", "mri.png is 64x201 pixels, expected sides of at most 200 (test_asfe.py"),
        ("too small", "mri.png is 64x15 pixels, expected sides of 16 or more"),
        ("transparent", "mri.png: has transparent pixels"),
        ("absent", "two images are needed"),
        ("swept", "mri.png is gone, as files are kept for 10 minutes; choose it again"),
    ],
)
def test_bad_uploads_get_a_sentence(page, tmp_path, kind, message):
    source, mri = pair_of_files(tmp_path)
    path = Path(mri)
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "other size":
        write_png(path, np.zeros((48, 48), np.uint8))
    elif kind == "too large":
        write_png(path, np.zeros((64, 201), np.uint8))
    elif kind == "too small":
        write_png(path, np.zeros((64, 15), np.uint8))
    elif kind == "transparent":
        cv2.imwrite(mri, np.zeros((64, 64, 4), np.uint8))
    elif kind == "swept":
        path.unlink()
    given = (source, None) if kind == "absent" else (source, mri)
    with pytest.raises(gradio.Error) as error:
        page.fuse(*given, "PET-MRI", "compact_all")
    assert message in error.value.message and str(tmp_path) not in error.value.message
    assert page.blend(50, *given) is None


def test_names_of_uploads_are_text_not_html():
    shown = tab.sentence(UserError("/tmp/x/<img src=x>.png: damaged"), "/tmp/x/<img src=x>.png")
    assert shown == "&lt;img src=x&gt;.png: damaged"


@pytest.fixture
def warned(page, monkeypatch) -> list[str]:
    """What the page says while a handler goes on."""
    said = []
    monkeypatch.setattr(page.gr, "Warning", lambda text, **_: said.append(text))
    return said


def test_a_new_upload_is_shown_and_clears_the_results(page, tmp_path, warned):
    source, mri = pair_of_files(tmp_path)
    image, kept, *results = page.show(source)
    assert np.array_equal(rgb(image), phantom_pair("PET-MRI", 64)[0]) and kept == image
    assert results == [None, None, "", "image 1 | fused", "", None] and not warned
    Path(mri).write_text("hello")
    assert page.show(mri)[0] is None
    assert warned == ["mri.png: damaged or not an image, expected PNG, TIFF, JPEG or BMP"]
    assert page.show(None)[0] is None and len(warned) == 1


VOLUMES = ("t1.nii.gz", "T1.NII", "t1.mha", "1.dcm", "series.zip", "IM0001")


@pytest.mark.parametrize("name", VOLUMES)
def test_a_volume_among_images_is_named(page, tmp_path, warned, name):
    path = tmp_path / name
    path.write_bytes(bytes(128) + b"DICM" + bytes(2**20))
    assert page.show(str(path))[0] is None
    assert warned == [f"{name} is a volume: use the tab Volumes"]


def test_one_wrong_file_is_one_message(page, tmp_path, warned):
    source, mri = pair_of_files(tmp_path)
    Path(mri).write_text("hello")
    page.show(source), page.blend(50, source, None)
    page.show(mri), page.blend(50, source, mri)
    assert len(warned) == 1


def test_a_colour_pet_that_is_called_ct_is_named(page, tmp_path):
    files = pair_of_files(tmp_path)
    *_, notes, _ = page.fuse(*files, "CT-MRI", "compact_all")
    assert notes.startswith("* source.png: is in colour, which no CT is; is it PET or SPECT")
    assert "the choice of the two images above another?" in notes and "--" not in notes


def test_the_blend_goes_from_one_source_to_the_other(page, tmp_path):
    files = pair_of_files(tmp_path)
    pet, mri = phantom_pair("PET-MRI", 64)
    assert np.array_equal(rgb(page.blend(0, *files)), pet)
    assert np.array_equal(rgb(page.blend(100, *files)), np.repeat(mri[..., None], 3, 2))
    half = rgb(page.blend(50, *files)).astype(float)
    assert np.abs(half - (pet / 2 + mri[..., None] / 2)).max() <= 0.5


def test_the_wipe_shows_what_was_chosen(page):
    made = app.Made((), "s", "f")
    assert page.wipe("image 2 | fused", "a", "b", made) == ("b", "f")
    assert page.wipe("image 1 | image 2", "a", "b", None) == ("a", "b")
    assert page.wipe("image 1 | fused", "a", "b", None) is None


def test_a_fault_of_ours_is_a_sentence_and_its_traceback_is_logged(page, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(page, "place", page.place._replace(log=logged.append))
    monkeypatch.setattr(clicks, "read_uint8", lambda file: 1 / 0)
    monkeypatch.setattr(clicks, "fuse_images", lambda *_: 1 / 0)
    files = pair_of_files(tmp_path)
    with pytest.raises(gradio.Error, match="a fault of the program, not of your files"):
        page.fuse(*files, "PET-MRI", "compact_all")
    assert len(logged) == 1 and "ZeroDivisionError" in logged[0]


def test_a_job_that_takes_too_long_or_dies_is_one_sentence(page, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(app, "JOBS", "child_jobs:")
    monkeypatch.setattr(limits, "IMAGE_SECONDS", 1)
    child = Child()
    other = app.Page(gradio, page.place, page.most, page.weights, child)
    child.start()
    for job, message in (
        (("sleep", 60), "it took over 1 seconds and was ended"),
        (("die", "SIGSEGV"), "the process that worked on it ended by SIGSEGV"),
    ):
        monkeypatch.setattr(other, "job", lambda *_, job=job: app.Page.job(other, *job))
        with pytest.raises(gradio.Error) as error:
            other.fuse(*pair_of_files(tmp_path), "PET-MRI", "compact_all")
        assert error.value.message.startswith(message)
    monkeypatch.undo()
    child.close()


def test_the_limits_of_a_turn_are_those_that_are_promised():
    assert (limits.IMAGE_SECONDS, limits.VOLUME_SECONDS) == (60, 300)


def test_the_examples_are_drawn(page):
    for task in TASKS:
        paths = example_paths(page.place.folder, task)
        assert all(map(np.array_equal, map(rgb, paths), map(in_colour, phantom_pair(task))))


def in_colour(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)


def test_weights_follow_the_task():
    names = ["compact_CT-MRI", "compact_PET-MRI", "other"]
    assert app.weights_for("PET-MRI", names) == "compact_PET-MRI"
    assert app.weights_for("SPECT-MRI", [*names, "compact_all"]) == "compact_all"
    assert app.weights_for("SPECT-MRI", ["mine"]) == "mine"
    assert set(app.weights_in(AppArgs().weights_dir)) >= {"compact_all"}


def test_old_files_are_swept_and_new_ones_stay(tmp_path):
    (tmp_path / "deep").mkdir()
    old, new = tmp_path / "deep" / "old.png", tmp_path / "new.png"
    old.write_text("")
    time.sleep(0.6)
    new.write_text("")
    app.sweep(tmp_path, 0.5)
    assert not old.exists() and new.exists()
    assert (tmp_path / "deep").exists(), "it has changed just now"
    app.sweep(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def start(*argv, **environment) -> subprocess.Popen:
    command = [sys.executable, ROOT / "app.py", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def test_the_temporary_folder_goes_with_the_program(tmp_path):
    with start("--port", 0, TMPDIR=str(tmp_path)) as process:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), "only this machine, unless asked"
        assert [path.name[:5] for path in tmp_path.glob("asfe-*")] == ["asfe-"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
    assert not list(tmp_path.glob("asfe-*"))


def test_what_a_killed_page_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with start("--port", 0, TMPDIR=str(tmp_path)) as process:
        assert process.stdout.readline().startswith("open ")
        (folder,) = tmp_path.glob("asfe-*")
        (folder / "uploads" / "scan.png").write_text("of a visitor")
        remove_left("asfe-", age=0)
        assert (folder / "uploads" / "scan.png").exists(), "its page still runs"
        process.kill()
    (tmp_path / "other").mkdir()
    remove_left("asfe-", age=3600)
    assert folder.exists(), "it may be of a page that starts just now"
    remove_left("asfe-", age=0)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_refused_request_is_one_line_in_the_log():
    """Gradio itself refuses a file that was not uploaded here, or that Pillow may not open."""
    with start("--port", 0) as process:
        address = process.stdout.readline().split()[1]
        with urllib.request.urlopen(f"{address}config") as reply:
            functions = json.load(reply)["dependencies"]
        fuse = next(f["id"] for f in functions if f["api_name"].startswith("fuse"))
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        ask = {"data": [file, file, "CT-MRI", "none"], "fn_index": fuse, "session_hash": "x"}
        for route in ("queue/join", "queue/data?session_hash=x"):
            body = json.dumps(ask).encode() if route == "queue/join" else None
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}gradio_api/{route}", body, headers)
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read().decode()
        assert "this request was refused" in text
        process.terminate()
        log = process.stderr.read()
    assert log.startswith("refused a request: InvalidPathError: ") and log.count("\n") == 1, log


@pytest.fixture
def call(in_process, monkeypatch, tmp_path):
    """Run app.py in this process, up to its error: exit code, stdout, stderr."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *argv: in_process(app, lambda: parse_args(AppArgs), *argv)
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights_dir", "DIR/none"], "no weights, expected *.safetensors"),
        (["--weights_dir", "DIR/bad"], "w.safetensors: damaged"),
        (["--port", "PORT"], "cannot listen on 127.0.0.1, port PORT"),
        (["--port", "-1"], "port is -1, expected at least 0"),
        (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        (["--DEVICE", "gpu"], "DEVICE is 'gpu', expected auto, cpu"),
    ],
)
def test_bad_settings_are_one_line(call, tmp_path, argv, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "w.safetensors").write_text("hello")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [word.replace("DIR", str(tmp_path)).replace("PORT", port) for word in argv]
        code, out, err = call("--port", 0, *argv)
    assert code == 2 and not out and err.count("\n") == 1, err
    assert err.startswith("app.py: error: ") and message.replace("PORT", port) in err, err
    assert not list((tmp_path / "temporary").iterdir()), "nothing stays"


def test_an_absent_gradio_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(ValueError, match=r"pip install -r requirements-app\.txt"),
        contextlib.ExitStack() as stack,
    ):
        app.serve(AppArgs(), tmp_path, stack)
