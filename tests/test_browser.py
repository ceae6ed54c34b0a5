"""The page of app.py in a real browser: what a visitor does, and what goes wrong for one.

Skips without Chromium; with ASFE_BROWSER=required (set by .ci/run where it is installed) fails.
"""

import os
import signal
import sys
import time
import urllib.request
from contextlib import suppress

import cv2
import numpy as np
import pytest
from browser import PATIENCE, Browser, children, missing, running

from args_setting import TASKS
from images import read_image, to_uint8, write_png
from phantom import phantom_pair
from weights import load_weights, shipped_path

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a page, and the number of its process."""
    if reason := missing():
        if os.environ.get("ASFE_BROWSER") == "required":
            pytest.fail(f"ASFE_BROWSER=required, but the test {reason}")
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("served"), "--max_mb", "1", "--volume_mb", "8") as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def user(address, tmp_path_factory):
    user = Browser(tmp_path_factory.mktemp("downloads"))
    yield user
    user.close()


def choose(user: Browser, task: str) -> None:
    user.click(f"#example-{task}")
    user.wait(lambda: user.picture("#image1") and user.picture("#image2"))


def pixels(address: str) -> np.ndarray:
    """The PNG at an address, as grey or RGB."""
    with urllib.request.urlopen(address, timeout=PATIENCE) as reply:
        image = cv2.imdecode(np.frombuffer(reply.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., ::-1]


def expected(folder, task: str, seed: int = 0) -> np.ndarray:
    """What the network makes of a phantom pair."""
    path, (source, mri) = folder / "source.png", phantom_pair(task, seed=seed)
    write_png(path, source)
    luma, chroma = read_image(path)
    model, _ = load_weights(shipped_path("compact", task))
    return to_uint8(model.fuse(luma, mri).numpy(), chroma)


def same(image: np.ndarray, other: np.ndarray) -> bool:
    """Up to a level of rounding: threads may add up in another order."""
    return image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1


def test_from_an_example_to_a_download(user, address, tmp_path):
    user.open(address)
    assert not user.picture("#fused") and not user.text("#numbers")
    choose(user, "PET-MRI")
    assert same(pixels(user.picture("#image1")), phantom_pair("PET-MRI")[0])
    user.click("#fuse")
    fused = user.wait(lambda: user.picture("#fused"))
    assert same(pixels(fused), expected(tmp_path, "PET-MRI"))
    assert len(user.wait(lambda: user.find("#wipe img"))) == 2 and user.picture("#blend")
    user.wait(lambda: "Qabf" in user.text("#numbers"))
    figures = user.text("#numbers")
    assert "fused max mean" in figures
    user.click("#fused a[download]")
    saved = user.wait(lambda: list(user.downloads.glob("*.png")))
    assert same(cv2.imread(str(saved[0]))[..., ::-1], pixels(fused))
    # another pair: the old results go, other ones come
    choose(user, "SPECT-MRI")
    user.wait(lambda: not user.picture("#fused") and not user.text("#numbers"))
    user.click("#fuse")
    other = user.wait(lambda: user.picture("#fused"))
    assert same(pixels(other), expected(tmp_path, "SPECT-MRI"))
    user.wait(lambda: "Qabf" in user.text("#numbers"))
    assert user.text("#numbers") != figures
    # nothing came from another machine
    script = "return performance.getEntriesByType('resource').map(r => new URL(r.name).host)"
    assert {host.split(":")[0] for host in user.driver.execute_script(script)} == {"127.0.0.1"}


def test_bad_uploads_get_a_sentence(user, address, tmp_path):
    user.open(address)
    (tmp_path / "notes.png").write_text("these are notes")
    user.upload("#file1", tmp_path / "notes.png")
    user.wait(lambda: "notes.png: damaged or not an image" in user.text("body"))
    (tmp_path / "large.png").write_bytes(bytes(2_000_000))
    user.upload("#file2", tmp_path / "large.png")
    user.wait(lambda: "large.png has 1.907 MB, expected at most 1 MB" in user.text("body"))
    user.open(address)
    (tmp_path / "huge.png").write_bytes(bytes(9_000_000))
    user.upload("#file2", tmp_path / "huge.png")
    user.wait(lambda: "exceed" in user.text("body"))
    user.open(address)
    for k, side in ((1, 64), (2, 80)):
        write_png(tmp_path / f"{side}.png", phantom_pair("CT-MRI", side)[k - 1])
        user.upload(f"#file{k}", tmp_path / f"{side}.png")
        user.wait(lambda k=k: user.picture(f"#image{k}"))
    user.click("#fuse")
    user.wait(lambda: "64.png is 64x64, 80.png is 80x80, expected equal" in user.text("body"))
    assert "Traceback" not in user.text("body") and not user.picture("#fused")


def test_one_error_is_one_message(user, address, tmp_path):
    user.open(address)
    (tmp_path / "t1.nii.gz").write_bytes(b"a volume")
    user.upload("#file1", tmp_path / "t1.nii.gz")
    said = "t1.nii.gz is a volume: use the tab Volumes"
    user.wait(lambda: said in user.text("body"))
    time.sleep(3)  # for a second message, should there be one
    assert len(user.find(".toast-close")) == 1
    user.click("#fuse")
    user.wait(lambda: "two images are needed" in user.text("body"))
    assert len(user.find(".toast-close")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process as Linux does")
def test_the_position_in_the_queue_is_told(user, server, tmp_path):
    from visitor import Visitor  # httpx comes with gradio

    address, pid = server
    user.open(address)
    choose(user, "CT-MRI")
    user.wait(lambda: user.picture("#blend"))
    other, paths = Visitor(address), [tmp_path / "ct.png", tmp_path / "mri.png"]
    for path, image in zip(paths, phantom_pair("CT-MRI", 64), strict=True):
        write_png(path, image)
    files = [other.upload(path) for path in paths]
    child = children(pid)[0]
    os.kill(child, signal.SIGSTOP)
    try:
        reply = other.click("fuse", *files, "CT-MRI", "compact_CT-MRI")
        time.sleep(1)
        user.click("#fuse")
        user.wait(lambda: user.find("#fused [aria-label^='in the queue, 1 before you']"))
    finally:
        with suppress(ProcessLookupError):  # its turn may be over
            os.kill(child, signal.SIGCONT)
    user.wait(lambda: user.picture("#fused"))
    assert not reply.wait().error


def test_four_users_at_once_each_get_their_own(user, address, tmp_path):
    own = [tmp_path / f"{name}.png" for name in ("ct", "mri")]
    for path, image in zip(own, phantom_pair("CT-MRI", seed=7), strict=True):
        write_png(path, image)
    wanted = {task: expected(tmp_path, task) for task in TASKS}
    wanted["upload"] = expected(tmp_path, "CT-MRI", seed=7)
    tabs = {}
    for name in wanted:
        user.driver.switch_to.new_window("tab")
        tabs[name] = user.driver.current_window_handle
        user.open(address)
        if name in TASKS:
            choose(user, name)
            continue
        for k, path in enumerate(own, 1):
            user.upload(f"#file{k}", path)
        user.wait(lambda: user.picture("#image1") and user.picture("#image2"))
    for tab in tabs.values():
        user.driver.switch_to.window(tab)
        user.click("#fuse")
    figures = set()
    for name, tab in tabs.items():
        user.driver.switch_to.window(tab)
        fused = user.wait(lambda: user.picture("#fused"))
        assert same(pixels(fused), wanted[name]), name
        user.wait(lambda: "Qabf" in user.text("#numbers"))
        figures.add(user.text("#numbers"))
    assert len(figures) == len(tabs), "each table is of its own pair"


def changed(user: Browser, selector: str, act) -> tuple[np.ndarray, np.ndarray]:
    """A picture before and after `act()`, as soon as it is another one."""
    before = user.picture(selector)
    act()
    after = user.wait(lambda: user.picture(selector) != before and user.picture(selector))
    return pixels(before), pixels(after)


def test_two_volumes_are_registered_and_looked_at(user, address, tmp_path, heads):
    nib = pytest.importorskip("nibabel", reason="needs requirements-volumes.txt")
    image = nib.load(heads["mri"])
    shift = np.eye(4)
    shift[:3, 3] = (12, -9, 7)
    moved = nib.Nifti1Image(image.get_fdata(dtype=np.float32), shift @ image.affine)
    moved.to_filename(tmp_path / "moved.nii.gz")
    user.open(address)
    user.click("button[role=tab]:not([aria-selected=true])")
    write_png(tmp_path / "slice.png", phantom_pair("CT-MRI", 64)[0])
    user.upload("#scan1", tmp_path / "slice.png")
    user.wait(lambda: "slice.png is an image, expected .nii" in user.text("body"))
    user.click("#scan1 button[aria-label='Clear']")
    user.click("#fuse-volumes")
    user.wait(lambda: "two scans are needed" in user.text("body"))
    user.open(address)
    user.click("button[role=tab]:not([aria-selected=true])")
    user.upload("#scan1", heads["ct"])
    user.upload("#scan2", tmp_path / "moved.nii.gz")
    user.wait(lambda: all("KB" in user.text(box) for box in ("#scan1", "#scan2")))
    user.click("#fuse-volumes")
    user.wait(lambda: user.find("#status [aria-label^='reading'], #status [aria-label*='slices']"))
    for plane in ("#axial", "#coronal", "#sagittal"):
        image = pixels(user.wait(lambda plane=plane: user.picture(plane)))
        assert image.shape == (360, 360, 3) and image.max() > 200
    assert "registered (rigid)" in user.text("#report") and user.picture("#overview")
    # a slider by the keyboard, and what is shown by a click
    other = user.picture("#coronal")
    slider = user.find("#axial-slice input[type=range]")[0]
    before, after = changed(user, "#axial", lambda: slider.send_keys("\ue014"))  # the right arrow
    assert (before != after).any() and user.picture("#coronal") == other
    seen = []
    for what in ("edges before", "edges after"):
        click = f"#shown input[value='{what}']"
        seen += changed(user, "#coronal", lambda click=click: user.click(click))[1:]
    assert (seen[0] != seen[1]).any()
    user.click("#saved a[download]")
    saved = user.wait(lambda: list(user.downloads.glob("fused*.nii.gz")))
    assert np.allclose(nib.load(saved[0]).header.get_zooms(), 2, atol=1e-3)
    # other scans: the old result goes
    user.click("#scan2 button[aria-label='Clear']")
    user.wait(lambda: not user.picture("#axial") and not user.text("#report"))
    script = "return performance.getEntriesByType('resource').map(r => new URL(r.name).host)"
    assert {host.split(":")[0] for host in user.driver.execute_script(script)} == {"127.0.0.1"}
