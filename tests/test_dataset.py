"""Reading and writing of images, pairs, augmentation, and the download of the data set."""

import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dataset
from args_setting import TASKS, DataArgs
from dataset import (
    Pair,
    TrainPairs,
    augmentation,
    match_pairs,
    read_image,
    read_luma8,
    read_pair,
    task_pairs,
    to_uint8,
    writable_folder,
    write_png,
)
from phantom import phantom_pair


def random_image(*shape: int, bits: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**bits, shape, dtype=f"uint{bits}")


def write_folder(folder: Path, names: list[str], side: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), random_image(side, side))
    return folder


# --- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "tif", "bmp", "PNG"])
def test_grey_is_read_as_it_is(tmp_path, extension):
    image = random_image(20, 30)
    cv2.imwrite(str(tmp_path / f"a.{extension}"), image)
    luma, chroma = read_image(tmp_path / f"a.{extension}")
    assert chroma is None and luma.dtype == np.float32
    assert np.array_equal(to_uint8(luma), image)


def test_jpeg_is_read(tmp_path):
    image = phantom_pair("CT-MRI", 64)[0]
    cv2.imwrite(str(tmp_path / "a.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    assert np.abs(read_luma8(tmp_path / "a.jpg").astype(int) - image).max() <= 3


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_keep_their_levels(tmp_path, extension, channels):
    image = random_image(20, 30, channels, bits=16).squeeze()
    cv2.imwrite(str(tmp_path / f"a.{extension}"), image)
    luma, chroma = read_image(tmp_path / f"a.{extension}")
    if channels == 1:
        assert np.array_equal(np.rint(luma * 65535), image)
    else:
        rgb = np.rint((luma[..., None] + chroma) * 65535)
        assert np.abs(rgb - image[..., ::-1]).max() <= 1


def test_grey_in_three_channels_is_grey(tmp_path):
    image = random_image(20, 30)
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([image] * 3))
    luma, chroma = read_image(tmp_path / "a.png")
    assert chroma is None and np.array_equal(to_uint8(luma), image)


def test_luma_is_bt601(tmp_path):
    image = random_image(20, 30, 3)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    expected = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(int)  # fixed point, so one level off
    assert np.abs(read_luma8(tmp_path / "a.png").astype(int) - expected).max() <= 1


def test_chroma_put_back_with_its_own_luma_is_the_image(tmp_path):
    image = random_image(20, 30, 3)
    write_png(tmp_path / "a.png", image)
    luma, chroma = read_image(tmp_path / "a.png")
    assert np.array_equal(to_uint8(luma, chroma), image)


def test_exchanging_the_luma_keeps_cb_and_cr(tmp_path):
    image = np.full((16, 16, 3), (140, 100, 90), np.uint8)
    write_png(tmp_path / "a.png", image)
    luma, chroma = read_image(tmp_path / "a.png")
    brighter = to_uint8(luma + 0.2, chroma)
    before, after = (
        cv2.cvtColor(i, cv2.COLOR_RGB2YCrCb).astype(int)[0, 0] for i in (image, brighter)
    )
    assert after[0] - before[0] == 51
    assert np.abs(after[1:] - before[1:]).max() <= 1


def test_rounding_and_clipping():
    luma = np.array([[-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.2]])
    assert to_uint8(luma).tolist() == [[0, 0, 0, 1, 255, 255]]


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
    image = np.dstack([random_image(20, 30, 3), np.full((20, 30), 255, np.uint8)])
    cv2.imwrite(str(tmp_path / "a.png"), image)
    assert read_image(tmp_path / "a.png")[0].shape == (20, 30)
    image[3, 4, 3] = 100
    cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(ValueError, match="transparent"):
        read_image(tmp_path / "a.png")


def test_a_decoder_that_comments_is_not_heard(tmp_path, capfd):
    """A TIFF whose strip is shorter than it says: libtiff and OpenCV would print several lines."""
    cv2.imwrite(str(tmp_path / "a.tif"), phantom_pair("CT-MRI", 64)[0])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    for place in range(len(data) - 40, len(data)):
        data[place] ^= 0x5A
    (tmp_path / "a.tif").write_bytes(data)
    try:
        read_image(tmp_path / "a.tif")
    except ValueError as error:
        assert "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "bmp"])
def test_damaged_images_are_refused_in_silence(tmp_path, capfd, extension):
    path = tmp_path / f"a.{extension}"
    cv2.imwrite(str(path), phantom_pair("CT-MRI", 128)[0])
    data = path.read_bytes()
    for wrong in (
        data[: len(data) // 2],
        data[:-8] if extension != "tif" else data[:9],
        b"",
        b"hi",
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="damaged or not an image"):
            read_image(path)
    assert capfd.readouterr() == ("", "")


def test_float_pixels_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.random.rand(20, 30).astype(np.float32))
    with pytest.raises(ValueError, match="float32, expected 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        write_png(tmp_path / "a.png", random_image(8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_may_be_tried_by_many_at_once(tmp_path):
    # the processes of torchrun do; with one name for all, some found their file gone
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(writable_folder, [tmp_path / "out"] * 2000)) == {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == []


# --- pairs -----------------------------------------------------------------------------------


def test_pairs_go_by_name_not_by_place(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["b.png", "c.tif", "d.png"])
    dir2 = write_folder(tmp_path / "2", ["c.png", "a.png", "b.bmp"])
    (dir1 / "notes.txt").write_text("no image")
    pairs = match_pairs(dir1, dir2, skip_unmatched=True)
    assert pairs == [
        Pair("b", dir1 / "b.png", dir2 / "b.bmp"),
        Pair("c", dir1 / "c.tif", dir2 / "c.png"),
    ]
    with pytest.raises(ValueError, match=r"a \(and 1 others\) is in .*2 but not in .*1"):
        match_pairs(dir1, dir2)


def test_wrong_folders_are_named(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["a.png", "a.bmp"])
    empty = write_folder(tmp_path / "2", [])
    other = write_folder(tmp_path / "3", ["z.png"])
    for folders, message in [
        ((dir1, other), "both a.bmp and a.png"),
        ((other, empty), "no images"),
        ((other, tmp_path / "4"), "no such folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            match_pairs(*folders)
    with pytest.raises(ValueError, match="dataset.py --download"):
        task_pairs(tmp_path, "CT-MRI", "test")
    with pytest.raises(ValueError, match="no file name occurs in both"):
        match_pairs(other, write_folder(tmp_path / "5", ["y.png"]), skip_unmatched=True)


def test_two_sizes_in_a_pair_are_named(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["a.png"], 32)
    dir2 = write_folder(tmp_path / "2", ["a.png"], 48)
    with pytest.raises(ValueError, match="32x32.*48x48"):
        read_pair(match_pairs(dir1, dir2)[0])


def test_the_real_data(shared):
    counts = {(t, s): len(task_pairs(shared / "HMIFDatasets", t, s)) for t in TASKS
              for s in ("train", "test")}  # fmt: skip
    assert counts == {
        ("CT-MRI", "train"): 160,
        ("CT-MRI", "test"): 24,
        ("PET-MRI", "train"): 245,
        ("PET-MRI", "test"): 24,
        ("SPECT-MRI", "train"): 333,
        ("SPECT-MRI", "test"): 24,
    }
    for task, is_colour in (("CT-MRI", False), ("PET-MRI", True), ("SPECT-MRI", True)):
        luma1, luma2, chroma = read_pair(task_pairs(shared / "HMIFDatasets", task, "test")[0])
        assert luma1.shape == luma2.shape == (256, 256)
        assert (chroma is not None) == is_colour


# --- training --------------------------------------------------------------------------------


def test_augmentation_treats_both_images_alike():
    image = torch.arange(64 * 64, dtype=torch.int32).view(64, 64)
    augment = augmentation(32)
    seen = set()
    for _ in range(200):
        one, two = augment(torch.stack([image, image + 5000]))
        assert one.shape == (32, 32) and torch.equal(one + 5000, two)
        step = (int(one[0, 1] - one[0, 0]), int(one[1, 0] - one[0, 0]))
        seen.add(step)
    # all eight symmetries of the square
    assert seen == {(a, b * 64) for a in (1, -1) for b in (1, -1)} | {
        (a * 64, b) for a in (1, -1) for b in (1, -1)
    }


def test_training_pairs(tmp_path):
    for name in ("a", "b"):
        for folder, image in zip("12", phantom_pair("PET-MRI", 64), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_png(tmp_path / folder / f"{name}.png", image)
    pairs = TrainPairs(match_pairs(tmp_path / "1", tmp_path / "2"), 48)
    img1, img2, name = pairs[1]
    assert len(pairs) == 2 and name == "b"
    assert img1.shape == img2.shape == (1, 48, 48)
    assert img1.dtype == torch.float32 and 0 <= img1.min() and img1.max() <= 1
    with pytest.raises(ValueError, match="patch_size is 65, but .* only 64x64"):
        TrainPairs(match_pairs(tmp_path / "1", tmp_path / "2"), 65)


# --- the HMIF data set -----------------------------------------------------------------------


def test_the_hash_list_is_that_of_the_data(shared):
    sums = dataset.hmif_sums()
    assert len(sums) == 2 * (160 + 24 + 245 + 24 + 333 + 24)
    for name in list(sums)[::97]:
        data = (shared / "HMIFDatasets" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sums[name]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small set on a local server: its address, its files and the list of requests."""
    root = tmp_path / "served"
    files = {}
    for task in TASKS:
        for folder, image in zip((TASKS[task], "MRI"), phantom_pair(task, 32), strict=True):
            name = f"{task}/test/{folder}/16009.png"
            (root / name).parent.mkdir(parents=True)
            write_png(root / name, image)
            files[name] = (root / name).read_bytes()
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    monkeypatch.setattr(dataset, "HMIF_SUMS", tmp_path / "SHA256SUMS")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root, files, requests
    server.shutdown()


def test_download_fetches_and_verifies(served, tmp_path):
    url, _, files, requests = served
    target = tmp_path / "target"
    assert dataset.download(target, url) == len(files)
    assert {str(p.relative_to(target)) for p in target.rglob("*.*")} == set(files)
    assert all((target / name).read_bytes() == data for name, data in files.items())
    # a second call asks for nothing, a damaged file is fetched again
    requests.clear()
    assert dataset.download(target, url) == 0 and requests == []
    damaged = next(iter(files))
    (target / damaged).write_bytes(b"half")
    assert dataset.check(target)[1] == [f"{damaged}: damaged, its hash differs"]
    assert dataset.download(target, url) == 1 and requests == [f"/{damaged}"]
    assert dataset.check(target)[1] == []


def test_download_refuses_other_bytes(served, tmp_path):
    url, root, files, _ = served
    wrong = list(files)[2]
    (root / wrong).write_bytes(b"something else")
    target = tmp_path / "target"
    with pytest.raises(ValueError, match=f"{wrong}: not the bytes"):
        dataset.download(target, url)
    assert not (target / wrong).exists()
    assert not list(target.rglob("*.part"))
    # once the server is right, the rest follows
    (root / wrong).write_bytes(files[wrong])
    dataset.download(target, url)
    assert dataset.check(target)[1] == []


def test_download_without_a_server(served, tmp_path):
    with pytest.raises(ValueError, match="run the command again"):
        dataset.download(tmp_path / "target", "http://127.0.0.1:9")


def test_check_names_what_is_wrong(served, tmp_path, capsys):
    url, _, files, _ = served
    target = tmp_path / "target"
    dataset.download(target, url)
    missing = list(files)[0]
    (target / missing).unlink()
    stray = target / "PET-MRI/test/MRI/41101.jpg"
    stray.write_bytes(b"")
    (target / "PET-MRI/test/41101.jpg").write_bytes(b"")  # as in the published collection
    found, wrong = dataset.check(target)
    assert "PET-MRI/test/41101.jpg: not part of the set, never read" in found
    assert "CT-MRI/test/CT: 0 of 1" in found and "CT-MRI/test/MRI: 1 of 1" in found
    assert wrong == [f"{missing}: missing", "PET-MRI/test/MRI/41101.jpg: not part of the set"]
    with pytest.raises(ValueError, match="2 things wrong"):
        dataset.main(DataArgs(data_dir=target))
    stray.unlink()
    dataset.download(target, url)
    dataset.main(DataArgs(data_dir=target))
    assert "all files present and verified" in capsys.readouterr().out
    dataset.main(DataArgs(data_dir=target, check=False))
    assert capsys.readouterr().out == ""
