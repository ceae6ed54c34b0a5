"""Compare folders of fused images by the metrics of metrics.py: means, ranks, tests, tables, plots.

The two trivial fusions, the pixelwise maximum and mean of the sources, always take part. Sources:
Demšar, JMLR 2006 (mean ranks, signed-rank test); Efron, Tibshirani 1993 (bootstrap); Holm 1979.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
from numpy import ndarray
from scipy import stats
from tqdm import tqdm

from args_setting import TASKS, MetricArgs
from dataset import Pair, images_in, match_pairs, read_luma8, task_pairs, write_bytes
from metrics import METRICS, PANEL, Luma, evaluate

TRIVIAL = {
    "max": np.maximum,
    "mean": lambda a, b: ((a.astype(np.uint16) + b + 1) // 2).astype(np.uint8),
}
Task = tuple[ndarray, ndarray, dict[str, ndarray]]  # lumas of the sources, and of each method
RESAMPLES = 10_000
MARKS = {  # of the best and the second
    "plain": ("{}", "{}"),
    "terminal": ("\033[1m{}\033[0m", "\033[4m{}\033[0m"),
    "markdown": ("**{}**", "<ins>{}</ins>"),
    "latex": (r"\textbf{{{}}}", r"\underline{{{}}}"),
}


@dataclass(frozen=True)
class Comparison:
    """Metrics of several methods on the same images; NaN where an image is too small for one."""

    title: str
    metrics: list[str]
    images: list[str]
    values: dict[str, ndarray]  # method -> (images, metrics)

    def mean(self, method: str) -> ndarray:
        """(metrics,) over the images that have a value, NaN where none has."""
        there = ~np.isnan(self.values[method])
        total = np.where(there, self.values[method], 0).sum(axis=0)
        count = there.sum(axis=0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def places(self) -> dict[str, ndarray]:
        """method -> (metrics,) place among the methods, 1 the best; ties share their mean place."""
        means = np.array([self.mean(method) for method in self.values])
        better = np.array([1 if METRICS[name].higher_is_better else -1 for name in self.metrics])
        places = stats.rankdata(-means * better, axis=0, nan_policy="omit")
        return dict(zip(self.values, places, strict=True))

    def mean_ranks(self) -> dict[str, float]:
        """Mean place over the metrics that have values."""
        return {m: float(p[~np.isnan(p)].mean()) for m, p in self.places().items()}


@dataclass(frozen=True)
class Difference:
    """What a method has more than another in one metric, paired by image."""

    metric: str
    mean: float
    low: float  # 95 % interval of the mean, percentiles of the bootstrap
    high: float
    p: float  # Wilcoxon's signed-rank test, two-sided
    p_holm: float  # the same, corrected for the number of metrics


def differences(result: Comparison, method1: str, method2: str, seed: int) -> list[Difference]:
    """Paired tests of method1 - method2, metric by metric, each over the images that have both."""
    for method in (method1, method2):
        if method not in result.values:
            raise ValueError(f"no method {method!r}, expected two of {', '.join(result.values)}")
    rng, rows = np.random.default_rng(seed), []
    with np.errstate(invalid="ignore"):  # PSNR may be infinite in both
        both = result.values[method1] - result.values[method2]
    for name, column in zip(result.metrics, both.T, strict=True):
        column = column[np.isfinite(column)]
        if not column.size:
            continue
        drawn = column[rng.integers(column.size, size=(RESAMPLES, column.size))].mean(axis=1)
        low, high = np.percentile(drawn, (2.5, 97.5))
        p = float(stats.wilcoxon(column).pvalue) if column.any() else 1.0
        rows.append((name, float(column.mean()), float(low), float(high), p))
    holm = _holm([row[-1] for row in rows])
    return [Difference(*row, p_holm) for row, p_holm in zip(rows, holm, strict=True)]


def _holm(p: list[float]) -> list[float]:
    corrected, least = [0.0] * len(p), 0.0
    for k, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - k) * p[i]))
        corrected[i] = least
    return corrected


def compare(
    folders: dict[str, Path | dict[str, Path]],
    pairs: Sequence[Pair],
    jobs: int = 0,
    metrics: Sequence[str] = PANEL,
    title: str = "",
    skip_unmatched: bool = False,
) -> Comparison:
    """Evaluate folders of fused images, matched to the pairs by file name; `jobs` 0: every core.

    In place of a folder it also takes the files themselves, by the names of their pairs.
    All methods are judged on the same images: a missing one is an error, or with `skip_unmatched`
    is left out for all of them. Files that belong to no pair are named on stderr.
    """
    for name in folders.keys() & TRIVIAL.keys():
        raise ValueError(f"the name {name!r} is that of a trivial fusion, expected NAME=FOLDER")
    files = {m: f if isinstance(f, dict) else images_in(f) for m, f in folders.items()}
    pairs = _matched(files, folders, pairs, skip_unmatched)
    tasks = _read(pairs, files)
    cv2.setNumThreads(1)  # the cores share out the pairs, not the rows of one image
    work = partial(_evaluate_pair, metrics=list(metrics))
    jobs = min(jobs or os.cpu_count() or 1, len(pairs))
    shown = {"total": len(tasks), "desc": title, "unit": "pair", "leave": False, "disable": None}
    if jobs == 1:
        rows = list(tqdm(map(work, tasks), **shown))
    else:
        with ProcessPoolExecutor(jobs, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            rows = list(tqdm(pool.map(work, tasks), **shown))
    values = {method: np.array([row[method] for row in rows]) for method in rows[0]}
    if all(np.isnan(v).all() for v in values.values()):
        raise ValueError(f"the images are too small for {', '.join(metrics)}")
    return Comparison(title, list(metrics), [pair.name for pair in pairs], values)


def _matched(
    files: dict[str, dict[str, Path]],
    folders: dict[str, Path],
    pairs: Sequence[Pair],
    skip_unmatched: bool,
) -> list[Pair]:
    names, lacking = {pair.name for pair in pairs}, []
    for method, found in files.items():
        if extra := sorted(found.keys() - names):
            _note(f"{folders[method]}: no sources for {', '.join(extra)}; left out")
        if missing := sorted(names - found.keys()):
            lacking.append(f"{folders[method]} lacks {', '.join(missing)}")
    if lacking and not skip_unmatched:
        raise ValueError(f"{'; '.join(lacking)} (--skip-unmatched compares without them)")
    if lacking:
        _note(f"{'; '.join(lacking)}; left out for every method")
    kept = [pair for pair in pairs if all(pair.name in found for found in files.values())]
    if not kept:
        raise ValueError("no pair of sources has a fused image in every folder")
    return kept


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _read(pairs: Sequence[Pair], files: dict[str, dict[str, Path]]) -> list[Task]:
    tasks, wrong = [], []
    for pair in pairs:
        paths = {method: found[pair.name] for method, found in files.items()}
        source1, source2 = read_luma8(pair.path1), read_luma8(pair.path2)
        fused = {method: read_luma8(path) for method, path in paths.items()}
        others = zip((pair.path2, *paths.values()), (source2, *fused.values()), strict=True)
        for path, image in others:
            if image.shape != source1.shape:
                sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (image, source1)]
                wrong.append(f"{path} is {sizes[0]}, expected {sizes[1]} as {pair.path1}")
        tasks.append((source1, source2, fused))
    if wrong:
        raise ValueError("; ".join(wrong))
    return tasks


def _evaluate_pair(task: Task, metrics: list[str]) -> dict[str, list[float]]:
    source1, source2, fused = task
    trivial = {method: combine(source1, source2) for method, combine in TRIVIAL.items()}
    sources = Luma(source1), Luma(source2)  # their maps serve every method
    rows = {}
    for method, image in (trivial | fused).items():
        values = evaluate(Luma(image), *sources, metrics)
        rows[method] = [values.get(name, math.nan) for name in metrics]
    return rows


def table(
    result: Comparison, style: str = "plain", rank: bool = False, methods: Sequence[str] = ()
) -> str:
    """A line for each metric, a column for each method; the best and the second are marked."""
    methods = list(methods or result.values)
    lines = [["metric", *methods]]
    places = result.places()
    for k, name in enumerate(result.metrics):
        means = {m: result.mean(m)[k] for m in result.values}
        cells = _cells(means, {m: places[m][k] for m in means}, style)
        lines.append([f"{name} {METRICS[name].arrow}", *(cells[m] for m in methods)])
    if rank:
        ranks = result.mean_ranks()
        order = dict(zip(ranks, stats.rankdata(list(ranks.values())), strict=True))
        cells = _cells(ranks, order, style, digits=2)
        lines.append(["mean rank ↓", *(cells[m] for m in methods)])
    return FORMATS[style](lines)


def _cells(
    values: dict[str, float], places: dict[str, float], style: str, digits: int | None = None
) -> dict[str, str]:
    order = sorted({place for place in places.values() if not math.isnan(place)})
    cells = {}
    for method, value in values.items():
        cells[method] = _number(value) if digits is None else f"{value:.{digits}f}"
        for mark, place in zip(MARKS[style], order, strict=False):
            if places[method] == place:
                cells[method] = mark.format(cells[method])
    return cells


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if 0.001 <= abs(value) < 10 or value == 0:
        return f"{value:.4f}"
    return f"{value:#.5g}" if abs(value) >= 10 else f"{value:.2e}"


def _aligned(lines: list[list[str]]) -> str:
    """Columns padded by what a terminal shows of a cell."""
    seen = [[len(re.sub(r"\033\[\d+m", "", cell)) for cell in line] for line in lines]
    widths = [max(column) for column in zip(*seen, strict=True)]
    text = []
    for line, lengths in zip(lines, seen, strict=True):
        pads = [" " * (w - n) for w, n in zip(widths, lengths, strict=True)]
        cells = [pad + cell for pad, cell in zip(pads[1:], line[1:], strict=True)]
        text.append("  ".join([line[0] + pads[0], *cells]).rstrip())
    return "\n".join(text) + "\n"


def _markdown(lines: list[list[str]]) -> str:
    rule = [":--"] + ["--:"] * (len(lines[0]) - 1)
    rows = ([cell.replace("|", "\\|") for cell in line] for line in (lines[0], rule, *lines[1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _latex(lines: list[list[str]]) -> str:
    arrows = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$"})
    names = str.maketrans({c: f"\\{c}" for c in "_&%#$"})
    head = [cell.translate(names) for cell in lines[0]]
    rows = [[line[0].translate(names).translate(arrows), *line[1:]] for line in lines[1:]]
    body = [" & ".join(row) + r" \\" for row in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", body[0], r"\hline", *body[1:]]
        + [r"\hline", r"\end{tabular}", ""]
    )


FORMATS = {"plain": _aligned, "terminal": _aligned, "markdown": _markdown, "latex": _latex}


def print_table(result: Comparison, rank: bool = False, file: TextIO | None = None) -> None:
    """The table of means, in blocks that fit the terminal; bold and underlined if it is one."""
    file = file or sys.stdout
    colour = file.isatty() and "NO_COLOR" not in os.environ
    print(f"{result.title}: means over {len(result.images)} images".lstrip(": "), file=file)
    methods, width = list(result.values), max(10, *map(len, result.values)) + 2
    block = max(1, (shutil.get_terminal_size().columns - 14) // width)
    for k in range(0, len(methods), block):
        shown = methods[k : k + block]
        print(table(result, "terminal" if colour else "plain", rank, shown), file=file)


def print_differences(rows: list[Difference], method1: str, method2: str) -> None:
    lines = [["metric", f"{method1} - {method2}", "95 % interval", "p", "p (Holm)"]]
    for row in rows:
        interval = f"{_number(row.low)} .. {_number(row.high)}"
        label = f"{row.metric} {METRICS[row.metric].arrow}"
        lines.append([label, _number(row.mean), interval, f"{row.p:.2g}", f"{row.p_holm:.2g}"])
    print(_aligned(lines))


def to_csv(result: Comparison) -> str:
    """Each image of each method, then the means; empty where an image is too small."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "image", *result.metrics])
    for method, values in result.values.items():
        rows = zip(result.images, values, strict=True)
        for image, row in (*rows, ("mean", result.mean(method))):
            cells = ("" if math.isnan(value) else repr(float(value)) for value in row)
            writer.writerow([method, image, *cells])
    return text.getvalue()


def to_json(result: Comparison, rank: bool, rows: list[Difference], between: Sequence[str]) -> str:
    """The same with ranks and differences; what JSON has no number for (NaN, infinity) is null."""

    def named(values: ndarray) -> dict[str, float | None]:
        pairs = zip(result.metrics, values.tolist(), strict=True)
        return {name: value if math.isfinite(value) else None for name, value in pairs}

    document = {
        "title": result.title,
        "higher_is_better": {name: METRICS[name].higher_is_better for name in result.metrics},
        "methods": {
            method: {
                "mean": named(result.mean(method)),
                "images": {i: named(v) for i, v in zip(result.images, values, strict=True)},
            }
            for method, values in result.values.items()
        },
    }
    if rank:
        document["mean_rank"] = result.mean_ranks()
    if rows:
        document["difference"] = {"between": list(between), "metrics": [asdict(r) for r in rows]}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def plot(result: Comparison, suffix: str) -> bytes:
    """A small panel for each metric: a dot for each image, a bar at the mean."""
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    columns = min(5, len(result.metrics))
    rows = math.ceil(len(result.metrics) / columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    spread = 0.5 * (np.arange(len(result.images)) * 0.618 % 1 - 0.5)  # even, and the same each run
    for k, panel in enumerate(panels):
        if k >= len(result.metrics):
            panel.set_axis_off()
            continue
        name = result.metrics[k]
        panel.set_title(f"{name} {METRICS[name].arrow}", fontsize=9)
        panel.set_xticks([])
        panel.tick_params(labelsize=7)
        for x, (method, values) in enumerate(result.values.items()):
            colour = f"C{x}"
            panel.plot(x + spread, values[:, k], ".", color=colour, markersize=3, alpha=0.6)
            mean = result.mean(method)[k]
            panel.plot([x - 0.4, x + 0.4], [mean, mean], color=colour, linewidth=2, label=method)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=suffix, dpi=150)
    return image.getvalue()


def name_folders(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER as it says; else the last part of the path that is not a task's name."""
    folders: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).exists():
            folder, parts = text, Path(text).resolve().parts
            name = parts[-2] if parts[-1] in TASKS else parts[-1]
        if not name:
            raise ValueError(f"{text} has no name, expected NAME=FOLDER")
        if name in folders:
            raise ValueError(
                f"{folder} and {folders[name]} would both be named {name!r}, expected NAME=FOLDER"
            )
        folders[name] = Path(folder)
    return folders


def report(args: MetricArgs) -> None:
    """Compare what the command line names, print it, and write the files it asks for."""
    if not args.fused:
        raise ValueError("--fused names no folder, expected at least one")
    if (args.dir1 is None) != (args.dir2 is None):
        raise ValueError("--dir1 and --dir2 come together, only one was given")
    if args.dir1:
        pairs, title = match_pairs(args.dir1, args.dir2, args.skip_unmatched), ""
    else:
        pairs = task_pairs(args.data_dir, args.task, "test", args.skip_unmatched)
        title = args.task
    formats = ("csv", "json", "markdown", "latex", "plot")
    outputs = {f: getattr(args, f) for f in formats if getattr(args, f) is not None}
    if len(set(outputs.values())) < len(outputs):
        raise ValueError(f"two outputs have one name: {', '.join(map(str, outputs.values()))}")
    for path in outputs.values():
        if not path.parent.is_dir():
            raise ValueError(f"the folder of {path} is not there, expected an existing one")
    metrics = tuple(dict.fromkeys(args.metrics)) or PANEL
    folders = name_folders(args.fused)
    result = compare(folders, pairs, args.jobs, metrics, title, args.skip_unmatched)
    rows = differences(result, *args.between, args.seed) if args.between else []
    makers = {
        "csv": lambda: to_csv(result),
        "json": lambda: to_json(result, args.rank, rows, args.between),
        "markdown": lambda: table(result, "markdown", args.rank),
        "latex": lambda: table(result, "latex", args.rank),
        "plot": lambda: plot(result, args.plot.suffix.lstrip(".")),
    }
    made = {outputs[f]: makers[f]() for f in outputs}
    print_table(result, args.rank)
    if rows:
        print_differences(rows, *args.between)
    for path, content in made.items():
        write_bytes(path, content if isinstance(content, bytes) else content.encode())
