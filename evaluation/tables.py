"""A comparison as text, CSV, JSON and plot.

Legend: a line is the list of a table's cells; its first cell names the metric, the others belong to
one method each.
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
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy import ndarray
from scipy import stats

from args_setting import MetricArgs
from cli import UserError, visible
from evaluation.compare import Comparison, Difference
from images import write_bytes

MARKS = {  # of the best and the second
    "plain": ("{}", "{}"),
    "terminal": ("\033[1m{}\033[0m", "\033[4m{}\033[0m"),
    "markdown": ("**{}**", "<ins>{}</ins>"),
    "latex": (r"\textbf{{{}}}", r"\underline{{{}}}"),
}


# --- table of means --------------------------------------------------------------------------


def table(
    result: Comparison, style: str = "plain", rank: bool = False, methods: Sequence[str] = ()
) -> str:
    """A line for each metric, a column for each method; the best and the second are marked.

    `style` is plain, terminal, markdown or latex. `rank` adds the mean rank. `methods` are the
    columns, all without it; marks and ranks count every method.
    """
    methods = list(methods or result.values)
    lines = [["metric", *map(visible, methods)]]
    ranks = result.ranks()
    for k, (name, metric) in enumerate(result.metrics.items()):
        means = {m: result.mean(m)[k] for m in result.values}
        cells = _marked_cells(means, {m: ranks[m][k] for m in means}, style)
        lines.append([f"{name} {metric.arrow}", *(cells[m] for m in methods)])
    if rank:
        mean_ranks = result.mean_ranks()
        order = dict(zip(mean_ranks, stats.rankdata(list(mean_ranks.values())), strict=True))
        cells = _marked_cells(mean_ranks, order, style, digits=2)
        lines.append(["mean rank ↓", *(cells[m] for m in methods)])
    return FORMATS[style](lines)


def _marked_cells(
    values: dict[str, float], ranks: dict[str, float], style: str, digits: int | None = None
) -> dict[str, str]:
    marked = sorted({rank for rank in ranks.values() if not math.isnan(rank)})
    cells = {}
    for method, value in values.items():
        cells[method] = _number(value) if digits is None else f"{value:.{digits}f}"
        for mark, rank in zip(MARKS[style], marked, strict=False):
            if ranks[method] == rank:
                cells[method] = mark.format(cells[method])
    return cells


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if 0.001 <= abs(value) < 10 or value == 0:
        return f"{value:.4f}"
    return f"{value:#.5g}" if abs(value) >= 10 else f"{value:.2e}"


def aligned(lines: list[list[str]]) -> str:
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


FORMATS = {"plain": aligned, "terminal": aligned, "markdown": _markdown, "latex": _latex}


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


def print_differences(result: Comparison, rows: list[Difference], between: Sequence[str]) -> None:
    """The rows of `differences` between two methods of the comparison."""
    lines = [["metric", visible(" - ".join(between)), "95 % interval", "p", "p (Holm)"]]
    for row in rows:
        interval = f"{_number(row.low)} .. {_number(row.high)}"
        label = f"{row.metric} {result.metrics[row.metric].arrow}"
        lines.append([label, _number(row.mean), interval, f"{row.p:.2g}", f"{row.p_holm:.2g}"])
    print(aligned(lines))


# --- files -----------------------------------------------------------------------------------


def named_files(args: MetricArgs) -> dict[str, Path]:
    """The files that a command line asks for, by --csv, --json, --markdown, --latex and --plot.

    Raises UserError if two are the same, or the folder of one is not there.
    """
    formats = ("csv", "json", "markdown", "latex", "plot")
    files = {f: getattr(args, f) for f in formats if getattr(args, f) is not None}
    if len(set(files.values())) < len(files):
        raise UserError(f"two outputs have one name: {', '.join(map(str, files.values()))}")
    for path in files.values():
        if not path.parent.is_dir():
            raise UserError(f"the folder of {path} is not there, expected an existing one")
    if "plot" in files:
        check_plot_format(files["plot"].suffix.lstrip("."))
    return files


def check_plot_format(suffix: str) -> None:
    """UserError if Matplotlib has no such format."""
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    if suffix.lower() not in (formats := Figure().canvas.get_supported_filetypes()):
        raise UserError(f"a plot cannot be {suffix!r}, expected one of {', '.join(formats)}")


def report(
    result: Comparison, rows: list[Difference], args: MetricArgs, files: dict[str, Path]
) -> None:
    """Print the tables of a command and write the files of `named_files`.

    Nothing is printed or written before all of it is made, and the files come first.
    """
    makers = {
        "csv": lambda _: to_csv(result),
        "json": lambda _: to_json(result, args.rank, rows, args.between),
        "markdown": lambda _: table(result, "markdown", args.rank),
        "latex": lambda _: table(result, "latex", args.rank),
        "plot": lambda path: plot(result, path.suffix.lstrip(".")),
    }
    contents = {path: makers[name](path) for name, path in files.items()}
    for path, content in contents.items():
        write_bytes(path, content if isinstance(content, bytes) else content.encode("utf-8"))
    print_table(result, args.rank)
    if rows:
        print_differences(result, rows, args.between)


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

    def by_metric(values: ndarray) -> dict[str, float | None]:
        items = zip(result.metrics, values.tolist(), strict=True)
        return {name: value if math.isfinite(value) else None for name, value in items}

    document = {
        "title": result.title,
        "higher_is_better": {name: m.higher_is_better for name, m in result.metrics.items()},
        "methods": {
            method: {
                "mean": by_metric(result.mean(method)),
                "images": {i: by_metric(v) for i, v in zip(result.images, values, strict=True)},
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
    """A small panel for each metric: a dot for each image, a bar at the mean.

    `suffix` is a format of Matplotlib's, as "png" or "pdf".
    """
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    columns = min(5, len(result.metrics))
    rows = math.ceil(len(result.metrics) / columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for k, panel in enumerate(panels):
        if k < len(result.metrics):
            _plot_metric(panel, result, k)
        else:
            panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=suffix, dpi=150)
    return image.getvalue()


def _plot_metric(panel, result: Comparison, k: int) -> None:
    """Draw the `k`-th metric of a comparison into a panel of Matplotlib's."""
    name, metric = list(result.metrics.items())[k]
    panel.set_title(f"{name} {metric.arrow}", fontsize=9)
    panel.set_xticks([])
    panel.tick_params(labelsize=7)
    spread = 0.5 * (np.arange(len(result.images)) * 0.618 % 1 - 0.5)  # even, and the same each run
    for x, (method, values) in enumerate(result.values.items()):
        colour = f"C{x}"
        panel.plot(x + spread, values[:, k], ".", color=colour, markersize=3, alpha=0.6)
        mean = result.mean(method)[k]
        panel.plot([x - 0.4, x + 0.4], [mean, mean], color=colour, linewidth=2, label=method)
