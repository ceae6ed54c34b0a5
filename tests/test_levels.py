"""Levels, orientation and pages of image files: each value that a file means, or a question."""

import struct
import zlib
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from task_files import files, write_task

from args_setting import ROOT, MetricArgs, TrainArgs
from cli import UserError
from dataset import TrainPairs, split_pairs
from evaluation.compare import read_samples
from images import Doubts, Reading, decode, parse_levels, read_image, read_luma8, write_png
from metrics import named_pairs
from phantom import phantom_pair

RAMP = np.arange(0, 4096, 8, dtype=np.uint16).reshape(16, 32)  # 12 bits, to 4088


def with_sbit(path: Path, values: np.ndarray, bits: int) -> Path:
    """A PNG of 16 bits that says of how many of them mean something."""
    data = cv2.imencode(".png", values)[1].tobytes()
    body = b"sBIT" + bytes([bits] * (1 if values.ndim == 2 else 3))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])  # after the signature and IHDR
    return path


def tiff_of_12_bits(path: Path, values: np.ndarray) -> Path:
    """Two values in three bytes; no package at hand writes that."""
    first, second = values.reshape(-1, 2).astype(int).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    tags = {256: values.shape[1], 257: values.shape[0], 258: 12, 259: 1, 262: 1}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: values.shape[0], 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head + packed.astype(np.uint8).tobytes())
    return path


# --- levels ----------------------------------------------------------------------------------


def test_a_png_with_12_bits_declared_is_read_by_them(tmp_path):
    path = with_sbit(tmp_path / "a.png", RAMP, 12)
    assert np.array_equal(read_image(path)[0], RAMP / np.float32(4095))
    assert np.array_equal(read_luma8(path), np.rint(RAMP / 4095 * 255))
    full = read_image(path, Reading("full"))[0]
    assert np.array_equal(full, RAMP / np.float32(65535))


def test_a_colour_png_with_12_bits_declared_is_read_by_them(tmp_path):
    colour = np.dstack([RAMP, RAMP // 2, RAMP // 4])
    luma, chroma = read_image(with_sbit(tmp_path / "a.png", colour, 12))
    assert np.allclose(luma[..., None] + chroma, colour[..., ::-1] / 4095, atol=1e-6)


@pytest.mark.parametrize("how", ["zeros", "repeated", "linear"])
def test_values_that_were_scaled_to_16_bits_stay_so(tmp_path, how):
    """As the PNG specification wants it of a file with sBIT; also dark ones."""
    dark = RAMP // 16 + np.uint16(1)
    for values in (RAMP, dark):
        scaled = {
            "zeros": values << 4,
            "repeated": values << 4 | values >> 8,
            "linear": np.rint(values / 4095 * 65535).astype(np.uint16),
        }[how]
        luma, _ = read_image(with_sbit(tmp_path / "a.png", scaled, 12))
        assert np.array_equal(luma, scaled / np.float32(65535))


@pytest.mark.parametrize(("bits", "white"), [(0, 65535), (16, 65535), (200, 65535), (8, 65535)])
def test_a_wrong_declaration_is_not_believed(tmp_path, bits, white):
    luma, _ = read_image(with_sbit(tmp_path / "a.png", RAMP, bits))
    assert np.array_equal(luma, RAMP / np.float32(white))


def test_a_tiff_of_12_bits_is_read_by_them(tmp_path):
    path = tiff_of_12_bits(tmp_path / "a.tif", RAMP)
    assert np.array_equal(decode(path).values, RAMP)
    assert np.array_equal(read_image(path)[0], RAMP / np.float32(4095))


@pytest.mark.parametrize(("most", "white"), [(4095, 4095), (1023, 65535), (4088, 65535)])
def test_max_sample_value_counts_where_it_is_that_of_bits(tmp_path, most, white):
    """1023 is less than what is there; 4088 is a statistic of the image."""
    tifffile.imwrite(tmp_path / "a.tif", RAMP, extratags=[(281, "H", 1, most, True)])
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], RAMP / np.float32(white))


def test_levels_of_the_user_win(tmp_path):
    path = with_sbit(tmp_path / "a.png", RAMP, 12)
    luma, _ = read_image(path, Reading((1000, 3000)))
    assert np.allclose(luma, np.clip((RAMP.astype(float) - 1000) / 2000, 0, 1), atol=1e-6)
    write_png(tmp_path / "b.png", (RAMP // 16).astype(np.uint8))
    luma, _ = read_image(tmp_path / "b.png", Reading((0, 128)))  # 8 bits, too
    assert np.allclose(luma, np.clip(RAMP // 16 / 128, 0, 1), atol=1e-6)
    assert np.array_equal(read_luma8(tmp_path / "b.png", Reading((0, 128))), np.rint(luma * 255))


def test_auto_leaves_8_bits_alone(tmp_path):
    dark = np.arange(0, 32, dtype=np.uint8).repeat(16).reshape(16, 32)
    write_png(tmp_path / "a.png", dark)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], dark / np.float32(255))
    told = Doubts("all")
    told.add(tmp_path / "a.png", decode(tmp_path / "a.png"), 1)
    assert not told.lines


@pytest.mark.parametrize("text", ["", "auto,full", "5", "5,5", "9,5", "-1,5", "0,65536", "0,1e3"])
def test_other_levels_are_refused(text):
    with pytest.raises(UserError, match="expected auto, full, or LOW,HIGH"):
        parse_levels(text)


@pytest.mark.parametrize(("most", "white"), [(100, 255), (1176, 4095), (4095, 4095), (9000, 16383)])
def test_a_dark_file_of_16_bits_is_questioned(tmp_path, most, white):
    cv2.imwrite(str(tmp_path / "a.png"), np.minimum(RAMP * 3, most))
    told = Doubts("CT-MRI")
    for _ in range(3):
        told.add(tmp_path / "a.png", decode(tmp_path / "a.png"), 2)
    [line] = told.notes()
    assert f"no value above {most}" in line and f"--levels auto 0,{white}" in line
    assert "a.png" in line and "(and 2 other files)" in line


@pytest.mark.parametrize("most", [0, 16384, 65535])
def test_black_and_bright_files_are_not_questioned(tmp_path, most):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((16, 16), most, np.uint16))
    told = Doubts("CT-MRI")
    told.add(tmp_path / "a.png", decode(tmp_path / "a.png"), 1)
    assert not told.lines


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_that_counts_from_white_is_turned(tmp_path, bits):
    values = RAMP << 4 if bits == 16 else (RAMP >> 4).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    expected = 1 - values / (2**bits - 1)
    assert np.allclose(read_image(tmp_path / "a.tif")[0], expected, atol=1e-6)
    if bits == 16:
        tags = [(281, "H", 1, 4095, True)]
        tifffile.imwrite(tmp_path / "b.tif", RAMP, photometric="miniswhite", extratags=tags)
        assert np.allclose(read_image(tmp_path / "b.tif")[0], 1 - RAMP / 4095, atol=1e-6)
        luma, _ = read_image(tmp_path / "b.tif", Reading((0, 2048)))
        assert np.allclose(luma, 1 - np.clip(RAMP / 2048, 0, 1), atol=1e-6)


# --- orientation -----------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "png16", "tif", "tif16", "tif16 grey"])
def test_orientation_is_honoured(tmp_path, kind, turn):
    """As Pillow would turn it; in the first corner is white."""
    image = np.zeros((16, 32), np.uint8)
    image[:8, :8] = 255
    exif = Image.Exif()
    exif[274] = turn
    upright = ImageOps.exif_transpose(_with_exif(Image.fromarray(image), exif, tmp_path))
    path = tmp_path / f"a.{kind[:3]}"
    if kind in ("jpg", "png"):
        options = {"quality": 100} if kind == "jpg" else {}
        Image.fromarray(np.dstack([image] * 3)).save(path, exif=exif, **options)
    elif kind == "png16":
        cv2.imwrite(str(path), np.dstack([image.astype(np.uint16) * 257] * 3))
        body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        data = path.read_bytes()
        path.write_bytes(data[:33] + chunk + data[33:])
    else:
        values = image.astype(np.uint16) * 257 if "16" in kind else image
        values, photometric = (
            (values, "minisblack") if "grey" in kind else (np.dstack([values] * 3), "rgb")
        )
        tags = [(274, "H", 1, turn, True)]
        tifffile.imwrite(path, values, photometric=photometric, extratags=tags)
    luma, _ = read_image(path)
    assert np.abs(luma * 255 - np.asarray(upright)).max() < 3


def _with_exif(image: Image.Image, exif: Image.Exif, folder: Path) -> Image.Image:
    image.save(folder / "exif.png", exif=exif)
    return Image.open(folder / "exif.png")


def test_exif_that_nobody_can_read_is_ignored(tmp_path):
    image = np.full((16, 32), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense", quality=100)
    assert np.abs(read_luma8(tmp_path / "a.jpg").astype(int) - image).max() <= 1


# --- pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey8", "grey16", "rgb16", "apng", "mpo"])
def test_pages_are_refused_or_chosen(tmp_path, kind):
    pages = np.stack([np.full((16, 32), level, np.uint8) for level in (50, 100, 150)])
    path = tmp_path / {"apng": "a.png", "mpo": "a.jpg"}.get(kind, "a.tif")
    if kind in ("apng", "mpo"):
        first, *others = [Image.fromarray(page) for page in pages]
        options = {"format": "MPO", "quality": 100} if kind == "mpo" else {}
        first.save(path, save_all=True, append_images=others, **options)
    else:
        values = pages if kind == "grey8" else pages.astype(np.uint16) * 257
        values = np.stack([values] * 3, -1) if kind == "rgb16" else values
        tifffile.imwrite(path, values, photometric="rgb" if kind == "rgb16" else "minisblack")
    with pytest.raises(UserError, match="has 3 pages, expected one; --page N"):
        read_image(path)
    for number, level in enumerate((50, 100, 150), start=1):
        assert np.abs(read_luma8(path, Reading(page=number)).astype(int) - level).max() <= 1
    for number in (0, 4):
        with pytest.raises(UserError, match=f"has 3 pages, so --page cannot be {number}"):
            read_image(path, Reading(page=number))


def test_a_page_that_is_damaged_is_one_line(tmp_path):
    pages = np.zeros((3, 16, 32), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pages[0], photometric="minisblack")
    for page in pages[1:]:
        tifffile.imwrite(tmp_path / "a.tif", page, photometric="minisblack", append=True)
    data = (tmp_path / "a.tif").read_bytes()
    for length in range(len(data) // 2, len(data), 7):
        (tmp_path / "a.tif").write_bytes(data[:length])
        for number in (1, 2, 3):
            with suppress(UserError):
                read_image(tmp_path / "a.tif", Reading(page=number))


def test_a_file_of_one_page_has_no_second(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((16, 16), np.uint8))
    assert read_image(tmp_path / "a.png", Reading(page=1))[0].shape == (16, 16)
    with pytest.raises(UserError, match="has 1 page, so --page cannot be 2"):
        read_image(tmp_path / "a.png", Reading(page=2))


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("folders", [False, True])
def test_levels_reach_the_fusion_and_its_metrics(call, brighter, tmp_path, folders):
    """By the brighter source in place of a network: 1176 of 4095 is 73 of 255."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "one" / "a.png"), np.full((32, 32), 1176, np.uint16))
    write_png(tmp_path / "two" / "a.png", np.full((32, 32), 20, np.uint8))
    argv = ["--dir1", tmp_path / "one", "--dir2", tmp_path / "two", "--out", tmp_path / "out"]
    written = tmp_path / "out" / "a.png"
    if not folders:
        argv = ["--img1", tmp_path / "one" / "a.png", "--img2", tmp_path / "two" / "a.png"]
        argv, written = [*argv, "--out", tmp_path / "o.png"], tmp_path / "o.png"
    code, out, _ = call(*argv)
    assert code == 0 and out.count("note:") == 1 and "--levels 0,4095 auto" in out
    assert (read_luma8(written) == 20).all()
    for levels in (["0,4095", "auto"], ["0,4095", "full"]):
        code, out, _ = call(*argv, "--levels", *levels, "--metrics")
        assert code == 0 and "note:" not in out and (read_luma8(written) == 73).all()
    code, _, err = call(*argv, "--levels", "0,4095")  # of both: source 2 has 20 of 4095
    assert code == 0 and (read_luma8(written) == 73).all()
    code, _, err = call(*argv, "--levels", "auto", "full", "auto")
    assert code == 2 and "levels has 3 values, expected one, or one a source" in err


def test_page_reaches_the_fusion(call, brighter, tmp_path):
    pages = np.stack([np.full((32, 32), level, np.uint8) for level in (50, 100)])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    write_png(tmp_path / "b.png", np.zeros((32, 32), np.uint8))
    argv = ["--img1", tmp_path / "a.tif", "--img2", tmp_path / "b.png", "--out", tmp_path / "o.png"]
    code, _, err = call(*argv)
    assert code == 2 and "--page N" in err and not (tmp_path / "o.png").exists()
    assert call(*argv, "--page", 2, 1)[0] == 0
    assert (read_luma8(tmp_path / "o.png") == 100).all()
    code, _, err = call(*argv, "--page", 2)
    assert code == 2 and "b.png: has 1 page" in err


@pytest.mark.parametrize(
    ("task", "colours", "lines"),
    [
        ("CT-MRI", (True, False), ["in colour, which no CT is", "--task another"]),
        ("CT-MRI", (False, True), ["in colour, which no MRI is", "swapped"]),
        ("PET-MRI", (False, False), ["is grey, but the weights learned PET in colours"]),
        ("CT-MRI", (False, False), []),
        ("PET-MRI", (True, False), []),
        ("all", (True, True), []),
    ],
)
def test_a_modality_that_cannot_be_gets_a_line(call, brighter, tmp_path, task, colours, lines):
    grey = np.full((32, 32), 90, np.uint8)
    for name, colour in zip("ab", colours, strict=True):
        image = np.dstack([grey, grey, grey + 100]) if colour else grey
        write_png(tmp_path / f"{name}.png", image)
    argv = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "b.png", "--out", tmp_path / "o.png"]
    code, out, _ = call(*argv, "--task", task)
    assert code == 0 and out.count("note:") == bool(lines)
    assert all(line in out for line in lines)


def test_the_images_of_a_task_raise_no_doubt(call, brighter, tmp_path):
    for task in ("CT-MRI", "PET-MRI", "SPECT-MRI"):
        data = write_task(tmp_path / "data", task, "test", {"a": 64})
        argv = ["--data_dir", data, "--task", task, "--out", tmp_path / "out" / task]
        code, out, _ = call(*argv)
        assert code == 0 and "note:" not in out
        assert files(tmp_path / "out" / task) == {"a.png"}


def test_levels_reach_training_and_metrics(tmp_path):
    data = write_task(tmp_path, "CT-MRI", "train", {"1001": 32})
    path = data / "CT-MRI" / "train" / "CT" / "1001.png"
    cv2.imwrite(str(path), np.full((32, 32), 1176, np.uint16))
    for levels, expected, doubts in (((), 5, 1), (("0,4095", "auto"), 73, 0)):
        pairs, *_ = split_pairs(TrainArgs(data_dir=data, val=0, levels=levels))
        train = TrainPairs(pairs, 32)
        assert (train.images[0][0] == expected).all() and len(train.doubts.lines) == doubts
        given = {"dir1": path.parent, "dir2": path.parents[1] / "MRI", "levels": levels}
        pairs, _ = named_pairs(MetricArgs(**given))
        [sample] = read_samples(pairs, {})
        assert (sample.source1 == expected).all()
        assert np.array_equal(sample.source2, read_luma8(pairs[0].path2))


def test_the_example_of_the_readme_fuses_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("pet", "mri"), phantom_pair("PET-MRI", 48), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    (tmp_path / "model_pre").symlink_to(ROOT / "model_pre")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    luma, chroma = read_image(tmp_path / "fused.png")
    assert chroma is not None and luma.shape == (48, 48)
    expected = read_image(tmp_path / "pet.png")[1]
    assert np.median(np.abs(chroma - expected)) < 0.01  # the colour of PET


@pytest.mark.parametrize("bits", (8, 16))
def test_levels_far_above_the_values_get_a_line(tmp_path, bits):
    """0 to 4095 on 8 bits is black."""
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.full((20, 20), 200, f"uint{bits}"))
    for levels, told in (((0, 4095), True), ((0, 255), False), ("full", False), ("auto", False)):
        doubts, reading = Doubts("CT-MRI"), Reading(levels)
        doubts.add(path, decode(path, reading), 1, reading)
        line = "; ".join(text for lines in doubts.lines.values() for text in lines)
        assert ("--levels says that 4095 is white, so it is nearly black" in line) == told
        assert f"{bits} bits, no value above 200" in line or not told
