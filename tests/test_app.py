"""What happens on the page of app.py, without a browser; `test_browser.py` has the rest."""

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

from args_setting import ROOT, AppArgs
from cli import UserError, parse_args, remove_left
from images import write_png
from phantom import phantom_pair

gradio = pytest.importorskip("gradio", reason="needs requirements-app.txt")

import app  # noqa: E402
import test_asfe  # noqa: E402
from args_setting import TestArgs  # noqa: E402


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> app.Page:
    folder = tmp_path_factory.mktemp("uploads")
    return app.Page(AppArgs(max_side=200), app.load_all(AppArgs()), folder)


def pair_of_files(folder: Path, task: str = "PET-MRI", side: int = 64) -> tuple[str, str]:
    paths = [folder / f"{name}.png" for name in ("source", "mri")]
    for path, image in zip(paths, phantom_pair(task, side), strict=True):
        write_png(path, image)
    return str(paths[0]), str(paths[1])


def rgb(path: str | Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def test_the_page_fuses_as_the_script_does(page, tmp_path):
    files = pair_of_files(tmp_path)
    fused, (source, right), measuring, _, made = page.fuse(*files, "compact_PET-MRI")
    assert np.array_equal(rgb(source), phantom_pair("PET-MRI", 64)[0]) and right == fused
    assert measuring == "Measuring …"
    out = tmp_path / "script.png"
    paths = {"img1": Path(files[0]), "img2": Path(files[1]), "out": out}
    test_asfe.main(TestArgs(task="PET-MRI", **paths))
    assert np.array_equal(rgb(out), rgb(fused))
    text = page.measure(made)
    assert "| metric | fused | max | mean | source 1 | source 2 |" in text and "Qabf ↑" in text
    assert Path(fused).name == "source_mri_fused.png", "the name of a download"
    # each click has files of its own
    assert page.fuse(*files, "compact_all")[0] != fused


def test_there_are_no_figures_of_what_is_gone(page, tmp_path):
    assert page.measure(None) == "", "other images were chosen meanwhile"
    *_, made = page.fuse(*pair_of_files(tmp_path), "compact_all")
    Path(made[1]).unlink()
    text = page.measure(made)
    assert text.startswith("No figures: ") and Path(made[1]).name in text
    assert str(page.folder) not in text


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
        page.fuse(*given, "compact_all")
    assert message in error.value.message and str(tmp_path) not in error.value.message
    assert page.blend(50, *given) is None


def test_names_of_uploads_are_text_not_html():
    shown = app.sentence(UserError("/tmp/x/<img src=x>.png: damaged"), "/tmp/x/<img src=x>.png")
    assert shown == "&lt;img src=x&gt;.png: damaged"


def test_a_new_upload_is_shown_and_clears_the_results(page, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(page.gr, "Warning", lambda text, **_: said.append(text))
    source, mri = pair_of_files(tmp_path)
    image, *results = page.show(source)
    assert np.array_equal(image, phantom_pair("PET-MRI", 64)[0]) and not said
    assert results == [None, None, "", "image 1 | fused", None]
    Path(mri).write_text("hello")
    assert page.show(mri)[0] is None
    assert said == ["mri.png: damaged or not an image, expected PNG, TIFF, JPEG or BMP"]
    assert page.show(None)[0] is None and len(said) == 1


def test_the_blend_goes_from_one_source_to_the_other(page, tmp_path):
    files = pair_of_files(tmp_path)
    pet, mri = phantom_pair("PET-MRI", 64)
    assert np.array_equal(page.blend(0, *files), pet)
    assert np.array_equal(page.blend(100, *files), np.repeat(mri[..., None], 3, 2))
    half = page.blend(50, *files).astype(float)
    assert np.abs(half - (pet / 2 + mri[..., None] / 2)).max() <= 0.5


def test_the_wipe_shows_what_was_chosen(page):
    assert page.wipe("image 2 | fused", "a", "b", "f") == ("b", "f")
    assert page.wipe("image 1 | image 2", "a", "b", None) == ("a", "b")
    assert page.wipe("image 1 | fused", "a", "b", None) is None


def test_weights_follow_the_task():
    names = ["compact_CT-MRI", "compact_PET-MRI", "other"]
    assert app.weights_for("PET-MRI", names) == "compact_PET-MRI"
    assert app.weights_for("SPECT-MRI", [*names, "compact_all"]) == "compact_all"
    assert app.weights_for("SPECT-MRI", ["mine"]) == "mine"
    assert set(app.load_all(AppArgs())) >= {"compact_all"}


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
        ask = {"data": [file, file, "none"], "fn_index": fuse, "session_hash": "x"}
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
    with pytest.raises(ValueError, match=r"pip install -r requirements-app\.txt"):
        app.serve(AppArgs(), tmp_path)
