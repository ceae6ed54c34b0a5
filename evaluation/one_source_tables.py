"""Folders of fused images, judged by what only one source shows: values, table and maps.

The measures are those of evaluation/one_source.py and evaluation/opposed.py. A method has the means
over its images. Tables also have the value of the worse source: the one of which less is kept.

Legend: H W pixels. Lumas are (H, W) float64 in [0, 1], not rounded again.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy import ndarray

from cli import UserError
from dataset import Pair
from evaluation.colour import hue_shift
from evaluation.compare import (
    Comparison,
    Difference,
    Files,
    StoredSample,
    decode_samples,
    in_processes,
    interval,
)
from evaluation.maps import Metric
from evaluation.one_source import OneSource, one_source, one_source_maps
from evaluation.opposed import opposed
from evaluation.sheets import contact_sheet
from evaluation.tables import (
    Row,
    aligned,
    finite,
    head_line,
    number,
    plot,
    print_rows,
    table_of,
    to_csv,
    to_json,
    write_made,
)
from evaluation.trivial import TRIVIAL
from images import Pixels, luma8, luma_and_chroma, to_uint8, write_png

BT601 = np.array([0.299, 0.587, 0.114])  # R, G, B
LARGER_IS_BETTER = {"kept1", "kept2", "conspicuous1", "conspicuous2"}
VALUES = {
    name: Metric(one_source, name in LARGER_IS_BETTER)  # a field of what the function returns
    for name in OneSource._fields
} | {"opposed": Metric(opposed, True), "hue": Metric(hue_shift, False)}
DIGITS = {"rise": 1, "hue": 1}  # after the point in a table; of the others three
UPTAKE_ONLY = ("rise", "hue")  # of PET and SPECT
WORSE = ("kept", "conspicuous")  # counted for the source with the lower mean
SHOWN = 0.1  # standard deviation in [0, 1] that a map shows as its brightest colour
Modalities = tuple[str, str]  # names of source 1 and 2


# --- values ----------------------------------------------------------------------------------


def compare_one_source(
    files: dict[str, Files], pairs: Sequence[Pair], jobs: int = 0, title: str = ""
) -> Comparison:
    """The values of OneSource, `opposed` and `hue` of each image and method, trivial ones first.

    `hue` is the mean shift of the hue in degrees, NaN where an image is grey. `files` has an image
    of each pair for each method, see `complete_pairs`; `jobs` as in `in_processes`.

    Raises UserError if a file cannot be read, or sizes differ.
    """
    rows = in_processes(judge, decode_samples(pairs, files), jobs, title)
    values = {method: np.array([row[method] for row in rows]) for method in rows[0]}
    return Comparison(title, VALUES, [pair.name for pair in pairs], values)


def judge(sample: StoredSample) -> dict[str, list[float]]:
    """method -> its values of one pair, in the order of VALUES."""
    sources = exact_luma(sample.source1), exact_luma(sample.source2)
    lumas8 = luma8(sample.source1), luma8(sample.source2)
    coloured = next((s for s in (sample.source1, sample.source2) if has_colour(s)), None)
    chroma = None if coloured is None else luma_and_chroma(coloured)[1]
    source = lumas8[0] if coloured is None else in_colour(coloured)
    rows = {}
    for method, fuse in TRIVIAL.items():
        fused = fuse(*lumas8) / 255
        hue = math.nan if chroma is None else hue_shift(to_uint8(fused, chroma), source)
        rows[method] = [*one_source(*sources, fused), opposed(*sources, fused), hue]
    for method, pixels in sample.fused.items():
        hue = hue_shift(in_colour(pixels), source)
        fused = exact_luma(pixels)
        rows[method] = [*one_source(*sources, fused), opposed(*sources, fused), hue]
    return rows


def exact_luma(pixels: Pixels) -> ndarray:
    """Luma of decoded pixels (H, W), float64 in [0, 1]."""
    values = (pixels.values.astype(np.float64) - pixels.black) / (pixels.white - pixels.black)
    return (values if values.ndim == 2 else values @ BT601).clip(0, 1)


def in_colour(pixels: Pixels) -> ndarray:
    """Decoded pixels in 8 bits, (H, W) or RGB (H, W, 3)."""
    return to_uint8(*luma_and_chroma(pixels))


def has_colour(pixels: Pixels) -> bool:
    """Whether decoded pixels have three channels that differ anywhere."""
    return pixels.values.ndim == 3 and bool(np.ptp(pixels.values, axis=2).any())


# --- tables ----------------------------------------------------------------------------------


def shows_colour(result: Comparison) -> bool:
    """Whether a source is in colour: then the hue of a trivial fusion is known."""
    hue = list(result.metrics).index("hue")
    return any(not np.isnan(values[:, hue]).all() for values in result.values.values())


def without_uptake(result: Comparison) -> Comparison:
    """The same without the values that are of PET and SPECT only."""
    kept = [k for k, name in enumerate(result.metrics) if name not in UPTAKE_ONLY]
    names = list(result.metrics)
    return Comparison(
        result.title,
        {names[k]: result.metrics[names[k]] for k in kept},
        result.images,
        {method: values[:, kept] for method, values in result.values.items()},
        result.people,
    )


def labels(result: Comparison, modalities: Modalities) -> dict[str, str]:
    """What a table calls each value."""
    words = {"brighter": "brighter than both", "rise": "rise, levels"}
    words |= {"opposed": "opposed details", "hue": "hue shift, degrees"}
    for number_, modality in enumerate(modalities, 1):
        words |= {f"kept{number_}": f"kept {modality}"}
        words |= {f"conspicuous{number_}": f"conspicuous {modality}"}
    words |= {name: f"{name}, worse source" for name in WORSE}
    return {name: words.get(name, name) for name in in_order(result.metrics)}


def with_worse(means: ndarray, names: Sequence[str]) -> dict[str, ndarray]:
    """(..., M) means -> each value by its name, then `kept` and `conspicuous`: the worse source's.

    NaN if the value of a source is undefined.
    """
    found = {name: means[..., k] for k, name in enumerate(names)}
    worse = {name: np.minimum(found[f"{name}1"], found[f"{name}2"]) for name in WORSE}
    return found | worse


def rows_of(result: Comparison, modalities: Modalities) -> list[Row]:
    """A row for each value; that of the worse source after those of both."""
    means = {m: with_worse(result.mean(m), list(result.metrics)) for m in result.values}
    names = labels(result, modalities)
    rows = []
    for name in in_order(result.metrics):
        higher = name in WORSE or result.metrics[name].higher_is_better
        arrow = "↑" if higher else "↓"
        values = {m: float(found[name]) for m, found in means.items()}
        rows.append(Row(f"{names[name]} {arrow}", values, higher, DIGITS.get(name, 3)))
    return rows


def in_order(names: Iterable[str]) -> list[str]:
    """The names of the values, that of the worse source after those of both."""
    lines = []
    for name in names:
        lines.append(name)
        if name.removesuffix("2") in WORSE:
            lines.append(name.removesuffix("2"))
    return lines


def one_source_table(
    result: Comparison, modalities: Modalities, style: str, methods: Sequence[str] = ()
) -> str:
    """A line for each value and a column for each method, as `evaluation.tables.table`."""
    return table_of(rows_of(result, modalities), style, methods or list(result.values))


def intervals(result: Comparison, method: str, seed: int) -> dict[str, tuple[float, float]]:
    """The 95 % interval over people of each value, also of the worse source; NaN of one person."""
    drawn = with_worse(result.resampled(method, seed), list(result.metrics))
    return {name: interval(values) for name, values in drawn.items()}


def interval_table(
    result: Comparison, modalities: Modalities, methods: Sequence[str], seed: int
) -> str:
    """The same lines, with an interval over people in each cell."""
    found = {method: intervals(result, method, seed) for method in methods}
    names = labels(result, modalities)
    names |= {name: f"{name}, worse source" for name in WORSE}
    lines = [["95 % interval", *methods]]
    for name, label in names.items():
        pairs = (found[method][name] for method in methods)
        lines.append([label, *("" if math.isnan(a) else f"{a:.3f} .. {b:.3f}" for a, b in pairs)])
    return aligned(lines)


def person_table(result: Comparison, modalities: Modalities, method: str) -> str:
    """A line for each person, with the means over their images."""
    names = labels(result, modalities)
    lines = [[method, "images", *(names[name] for name in result.metrics)]]
    for person, means in result.means_by_person(method).items():
        count = sum(who == person for who in result.persons)
        cells = (number(v, DIGITS.get(n, 3)) for n, v in zip(result.metrics, means, strict=True))
        lines.append([person, str(count), *cells])
    return aligned(lines)


def print_one_source(
    result: Comparison, modalities: Modalities, given: list[str], seed: int
) -> None:
    """The table of all methods, and the intervals of those that are given as folders."""
    print(head_line(result))
    print_rows(rows_of(result, modalities), list(result.values), sys.stdout)
    if len(set(result.persons)) > 1:
        print(interval_table(result, modalities, given, seed))
    else:
        print("one person only: no interval\n")


# --- files -----------------------------------------------------------------------------------


def write_one_source(
    result: Comparison,
    files: dict[str, Path],
    modalities: Modalities,
    seed: int,
    rows: Sequence[Difference] = (),
    between: Sequence[str] = (),
) -> None:
    """Write the values as the files of `evaluation.tables.check_outputs`.

    JSON also has the worse source's values, and the intervals over people.
    """
    worse = {
        method: finite(
            {
                name: float(with_worse(result.mean(method), list(result.metrics))[name])
                for name in WORSE
            }
        )
        for method in result.values
    }
    write_made(
        files,
        {
            "csv": lambda _: to_csv(result),
            "json": lambda _: to_json(
                result,
                False,
                rows,
                between,
                {"worse_source": worse, "interval": all_intervals(result, seed)},
            ),
            "markdown": lambda _: one_source_table(result, modalities, "markdown"),
            "latex": lambda _: one_source_table(result, modalities, "latex"),
            "plot": lambda path: plot(result, path.suffix.lstrip("."), seed),
        },
    )


def all_intervals(result: Comparison, seed: int) -> dict[str, dict]:
    """method -> value -> (low, high), None where there is no interval."""
    return {
        method: {
            name: None if math.isnan(low) else (low, high)
            for name, (low, high) in intervals(result, method, seed).items()
        }
        for method in result.values
    }


# --- maps ------------------------------------------------------------------------------------


def check_maps(folder: Path, files: dict[str, Files], pairs: Sequence[Pair]) -> None:
    """UserError if the pictures would lie among the images that they are made of, or nowhere."""
    if not folder.parent.is_dir():
        raise UserError(f"the folder of {folder} is not there, expected an existing one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for the maps")
    paths = [path for of_method in files.values() for path in of_method.values()]
    paths += [path for pair in pairs for path in (pair.path1, pair.path2)]
    if folder.resolve() in {path.resolve().parent for path in paths}:
        raise UserError(f"{folder} holds images that are compared, expected another for the maps")


def write_maps(
    folder: Path, files: dict[str, Files], pairs: Sequence[Pair], modalities: Modalities
) -> None:
    """A picture for each pair, NAME.png in `folder`: for each method what is lost, and where.

    The maps show contrast, black for none and the brightest colour for `SHOWN` of the range or
    more: what only one source has and the fused image does not keep, and what no source has.
    """
    folder.mkdir(exist_ok=True)
    one, two = modalities
    titles = [one, two, "fused", f"lost of {one}", f"lost of {two}", "foreign"]
    for pair, sample in zip(pairs, decode_samples(pairs, files), strict=True):
        sources = exact_luma(sample.source1), exact_luma(sample.source2)
        pictures = [in_colour(sample.source1), in_colour(sample.source2)]
        rows = []
        for method, pixels in sample.fused.items():
            maps = one_source_maps(*sources, exact_luma(pixels))
            found = [as_heat(m) for m in (maps.lost1, maps.lost2, maps.foreign)]
            rows.append((method, [*pictures, in_colour(pixels), *found]))
        write_png(folder / f"{pair.name}.png", contact_sheet(rows, titles))


def as_heat(contrast: ndarray) -> ndarray:
    """RGB (H, W, 3) uint8 of a map of contrast."""
    levels = to_uint8(contrast / SHOWN)
    return cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
