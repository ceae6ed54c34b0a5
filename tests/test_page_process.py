"""The page as a server, and the child processes behind it: what the worst visitor can do to both.

A visitor here is a session without a browser; `test_browser.py` has one with.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import children, running

from images import write_png
from phantom import phantom_pair

pytest.importorskip("gradio", reason="needs requirements-app.txt")
pytest.importorskip("nibabel", reason="needs requirements-volumes.txt")
import hostile_files as bad
from visitor import Visitor

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them"),
]
MOST = 1500  # MB that the page's own process may have, docs/limits.md
PAIR = "CT-MRI", "compact_CT-MRI"


class Served:
    """A page in a process of its own."""

    def __init__(self, address: str, pid: int, log: Path):
        self.address, self.pid, self.log = address, pid, log

    def children(self) -> list[int]:
        """The processes behind the page; the first one is that for images."""
        return children(self.pid)

    def megabytes(self) -> float:
        """The memory of the page's own process at its peak."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with running(folder, "--threads", "1", log=folder / "log") as (address, pid):
        yield Served(address, pid, folder / "log")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    paths = folder / "ct.png", folder / "mri.png"
    for path, image in zip(paths, phantom_pair("CT-MRI", 64), strict=True):
        write_png(path, image)
    return paths


def fused(visitor: Visitor, pair: tuple[Path, Path]):
    """A click on Fuse."""
    return visitor.click("fuse", *map(visitor.upload, pair), *PAIR)


def works(served: Served, pair: tuple[Path, Path]) -> None:
    reply = fused(Visitor(served.address), pair).wait()
    assert not reply.error and reply.data[0]["path"].endswith("ct_mri_fused.png"), reply.error


def until(happened) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_child_that_dies_under_a_click_is_one_sentence(served, pair, how):
    works(served, pair)
    child = served.children()[0]
    os.kill(child, signal.SIGSTOP)  # so that it dies while the click runs
    reply = fused(Visitor(served.address), pair)
    time.sleep(1)
    os.kill(child, how)
    os.kill(child, signal.SIGCONT)
    reply.wait()
    assert f"the process that worked on it ended by {how.name}: " in reply.error
    works(served, pair)
    assert child not in served.children()
    assert "Traceback" not in served.log.read_text()


def test_a_queue_tells_the_position_and_takes_one_click_of_a_visitor(served, pair):
    works(served, pair)
    first, second = Visitor(served.address), Visitor(served.address)
    os.kill(served.children()[0], signal.SIGSTOP)
    try:
        now = fused(first, pair)
        time.sleep(1)
        waiting = fused(second, pair)
        until(lambda: "in the queue, 1 before you" in waiting.said)
        refused = fused(second, pair).wait()
        assert "your last click still waits for its turn" in refused.error
        third = fused(Visitor(served.address), pair)
        until(lambda: "in the queue, 2 before you" in third.said)
    finally:
        os.kill(served.children()[0], signal.SIGCONT)
    for reply in (now, waiting, third):
        assert not reply.wait().error
    assert "in the queue, 1 before you" in third.said


def test_one_wrong_file_is_one_message(served, pair, tmp_path):
    visitor = Visitor(served.address)
    (tmp_path / "t1.nii.gz").write_bytes(b"a volume")
    file = visitor.upload(tmp_path / "t1.nii.gz")
    replies = [visitor.click("show", file).wait(), visitor.click("blend", 50, file, None).wait()]
    assert [reply.said for reply in replies] == [["t1.nii.gz is a volume: use the tab Volumes"], []]
    assert not any(reply.error for reply in replies)
    reply = visitor.click("fuse", file, visitor.upload(pair[1]), *PAIR).wait()
    assert reply.error == "t1.nii.gz is a volume: use the tab Volumes"


HOSTILE = {
    "scans.jpg": lambda _: bad.many_scans(),
    "page.tif": lambda _: bad.second_page(),
    "exif.png": lambda _: bad.png_with_exif(),
    "pages.tif": lambda _: bad.many_pages(),
    "tile.tif": lambda _: bad.huge_tile(),
    "moves.png": lambda _: bad.animation(),
    "long.nii.gz": bad.extended,
    "empty.nii.gz": bad.empty_volume((1000, 1000, 500)),
    "large.mgz": bad.mgz,
    "bomb.dcm": bad.deflated_bomb,
    "fields.dcm": lambda _: bad.many_fields(),
    "items.dcm": bad.many_items,
}


def storm(served: Served, folder: Path, count: int) -> None:
    """So many hostile uploads, one after the other; those that are not mutated are refused."""
    chance = random.Random(3407)
    files = [(folder / name, make) for name, make in HOSTILE.items()]
    for path, make in files:
        (inner := folder / f"of {path.name}").mkdir()
        path.write_bytes(make(inner))
    visitor = Visitor(served.address)
    for k in range(count):
        path, _ = files[k % len(files)]
        data = bytearray(path.read_bytes())
        places = chance.choice((0, 0, 3, 30)) if k >= len(files) else 0
        for _ in range(places):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (sent := folder / f"{k}_{path.name}").write_bytes(data)
        file = visitor.upload(sent)
        if path.suffix in (".gz", ".mgz", ".dcm"):
            words = "CT-MRI", "quick look: voxels of 2 mm", "off", "fused", *MORE
            reply = visitor.click("fuse_1", file, file, *words).wait()
            said = [reply.error] if reply.error else []
        else:
            said = visitor.click("show", file).wait().said
        assert len(said) == 1 or (places and not said), f"{sent.name}: {said}"
        assert "fault of the program" not in str(said), f"{sent.name}: {said}"
        sent.unlink()


MORE = "", "", "", "", "wide", "sform", False, []


def test_the_page_stays_small_under_hostile_uploads(served, pair, tmp_path):
    storm(served, tmp_path, len(HOSTILE))
    works(served, pair)
    assert served.megabytes() < MOST
    assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
def test_the_page_stays_small_under_200_hostile_uploads(served, pair, tmp_path):
    storm(served, tmp_path, 200)
    works(served, pair)
    assert served.megabytes() < MOST
    assert "Traceback" not in served.log.read_text()
