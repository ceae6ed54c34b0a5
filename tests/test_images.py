"""Image files: what is read is what is stored, what is damaged is refused in silence."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import images
import limits
from cli import UserError
from images import (
    read_image,
    read_luma8,
    to_uint8,
    whole_file,
    writable_folder,
    write_bytes,
    write_png,
)
from phantom import phantom_pair


def random_image(*shape: int, bits: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**bits, shape, dtype=f"uint{bits}")


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


def hue(rgb: np.ndarray) -> np.ndarray:
    """The angle of Cb and Cr of RGB in [0, 1] as a complex number of their length."""
    luma = rgb @ [0.299, 0.587, 0.114]
    return 0.564 * (rgb[..., 2] - luma) + 0.713j * (rgb[..., 0] - luma)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_luma_keeps_its_value_and_the_hue(dtype):
    rng = np.random.default_rng(0)
    rgb = rng.random((40, 50, 3)).astype(dtype)
    chroma = rgb - (rgb @ images.BT601.astype(dtype))[..., None]
    luma = rng.uniform(-0.2, 1.2, (40, 50)).astype(dtype)
    done = images.coloured(luma, chroma)
    assert done.min() > -1e-6 and done.max() < 1 + 1e-6
    assert done @ [0.299, 0.587, 0.114] == pytest.approx(luma.clip(0, 1), abs=1e-6)
    turned = hue(done) * hue(rgb).conj()
    clear = np.abs(hue(done)) > 1e-3
    assert clear.mean() > 0.6
    assert np.abs(np.angle(turned[clear])).max() < 1e-3
    full = np.abs(hue(rgb)) - np.abs(hue(done)) < 1e-6  # the whole chroma fits, or one channel is
    at_end = np.minimum(done.min(-1), 1 - done.max(-1)) < 1e-6  # black or white
    assert (full | at_end).all() and full.any() and not full.all()


def test_the_stored_colour_has_the_luma_and_hue_to_rounding():
    rgb = random_image(60, 60, 3) / np.float32(255)
    chroma = rgb - (rgb @ images.BT601)[..., None]
    luma = np.linspace(0, 1, 3600, dtype=np.float32).reshape(60, 60)
    stored = to_uint8(luma, chroma)
    assert np.abs(stored @ [0.299, 0.587, 0.114] - 255 * luma).max() <= 0.501
    clear = np.abs(hue(stored / 255)) > 0.1
    turned = np.angle(hue(stored / 255) * hue(rgb).conj(), deg=True)
    assert clear.mean() > 0.2 and np.abs(turned[clear]).max() < 3
    assert np.abs(turned[clear]).mean() < 0.6


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


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4)])
def test_a_decoder_that_comments_is_not_heard(tmp_path, capfd, shape):
    """A TIFF whose strip is shorter than it says: libtiff and OpenCV would print several lines."""
    bits = 16 if len(shape) == 3 else 8  # which OpenCV and Pillow decode
    cv2.imwrite(str(tmp_path / "a.tif"), random_image(*shape, bits=bits))
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


@pytest.mark.parametrize("kind", ["float32", "int16", "int32"])
def test_other_pixels_are_refused(tmp_path, kind):
    """A CT in HU is often stored as int16; its air must not come out white."""
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((20, 30), -5, kind))
    with pytest.raises(ValueError, match=f"{kind}, expected 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["ICO", "GIF", "PPM"])
def test_another_format_is_refused_whatever_its_name(tmp_path, kind):
    Image.fromarray(random_image(32, 32)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(ValueError, match="damaged or not an image"):
        read_image(tmp_path / "a.png")


def test_reading_in_threads_keeps_stderr(tmp_path, capfd):
    """It used to be turned off for the whole process while a file was read, at times for good."""
    write_png(tmp_path / "a.png", random_image(64, 64))
    before = os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        readings = [pool.submit(read_image, tmp_path / "a.png") for _ in range(200)]
        while not all(reading.done() for reading in readings):
            assert os.fstat(2).st_ino == before.st_ino
            os.write(2, b"heard\n")
    assert os.fstat(2).st_ino == before.st_ino
    assert set(capfd.readouterr().err.split()) <= {"heard"}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        write_png(tmp_path / "a.png", random_image(8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_bytes(tmp_path / "b", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "b", b"new")
    assert (tmp_path / "b").read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("count", [10, 10**6])
def test_a_full_disk_is_named_with_the_file(tmp_path, count):
    """Also by torch.save, which hides it behind an error of its own."""
    path = tmp_path / "a.pt"
    write_bytes(path, b"old")
    for write in (torch.save, lambda values, file: file.write(values.numpy().tobytes())):
        (tmp_path / "a.pt.part").symlink_to("/dev/full")
        full = pytest.raises(OSError, match=r"No space left on device: .*a\.pt'")
        with full, whole_file(path) as file:
            write(torch.zeros(count), file)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_longest_name_can_be_written(tmp_path):
    for name in ("a" * 251 + ".png", "é" * 120 + ".png"):
        write_png(tmp_path / name, random_image(16, 16))
        assert np.array_equal(read_luma8(tmp_path / name), random_image(16, 16))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_may_be_tried_by_many_at_once(tmp_path):
    # the processes of torchrun do; with one name for all, some found their file gone
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(writable_folder, [tmp_path / "out"] * 2000)) == {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    """13000 x 13000 in 21 kB: decoded it would take 169 MB, and four times that as luma."""
    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "values_of", None)
    with pytest.raises(UserError, match="has 13000x13000 pixels, expected at most 34 million"):
        read_image(tmp_path / "a.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "b.png")  # more than Pillow takes
    with pytest.raises(UserError, match="far too many pixels, expected at most 34 million"):
        read_image(tmp_path / "b.png")
    with (tmp_path / "c.png").open("wb") as file:
        file.truncate(limits.IMAGE_BYTES + 1)
    with pytest.raises(UserError, match="too large, expected at most 256 MB"):
        read_image(tmp_path / "c.png")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "EPS", "PPM", "PCX"])
def test_other_formats_are_not_opened_whatever_the_name_says(tmp_path, kind):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", kind)
    with pytest.raises(UserError, match="damaged or not an image, expected PNG, TIFF, JPEG or BMP"):
        read_image(tmp_path / "a.png")
