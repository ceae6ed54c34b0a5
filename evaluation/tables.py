"""A comparison as text, CSV, JSON and plot.

Legend: a row has the values of all methods in one metric. A line is the list of a table's cells:
the first cell names the metric, the others belong to one method each.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy import ndarray
from scipy import stats

from cli import UserError, visible
from evaluation.compare import Comparison, Difference, interval
from images import write_bytes

MARKS = {  # of the best and the second
    "plain": ("{}", "{}"),
    "terminal": ("\033[1m{}\033[0m", "\033[4m{}\033[0m"),
    "markdown": ("**{}**", "<ins>{}</ins>"),
    "latex": (r"\textbf{{{}}}", r"\underline{{{}}}"),
}


# --- table of means --------------------------------------------------------------------------


class Row(NamedTuple):
    """What a line of a table is made of; the best and the second value are marked."""

    label: str
    values: dict[str, float]  # by method
    higher_is_better: bool
    digits: int | None = None  # after the point; None: as `number` has them


def rows_of(result: Comparison, rank: bool = False) -> list[Row]:
    """A row for each metric, with the means; `rank` adds the mean rank."""
    rows = [
        Row(
            f"{name} {metric.arrow}",
            {m: float(result.mean(m)[k]) for m in result.values},
            metric.higher_is_better,
        )
        for k, (name, metric) in enumerate(result.metrics.items())
    ]
    return [*rows, Row("mean rank ↓", result.mean_ranks(), False, 2)] if rank else rows


def table(
    result: Comparison, style: str = "plain", rank: bool = False, methods: Sequence[str] = ()
) -> str:
    """A line for each metric, a column for each method; the best and the second are marked.

    `style` is plain, terminal, markdown or latex. `rank` adds the mean rank. `methods` are the
    columns, all without it; marks and ranks count every method.
    """
    return table_of(rows_of(result, rank), style, methods or list(result.values))


def table_of(rows: list[Row], style: str, methods: Sequence[str]) -> str:
    """The table of some rows, with these methods as columns."""
    lines = [["metric", *map(visible, methods)]]
    for row in rows:
        cells = _marked_cells(row, style)
        lines.append([row.label, *(cells[m] for m in methods)])
    return FORMATS[style](lines)


def _marked_cells(row: Row, style: str) -> dict[str, str]:
    sign = -1 if row.higher_is_better else 1
    ranks = stats.rankdata([sign * v for v in row.values.values()], nan_policy="omit")
    marked = sorted({rank for rank in ranks if not math.isnan(rank)})
    cells = {}
    for (method, value), own in zip(row.values.items(), ranks, strict=True):
        cells[method] = number(value, row.digits)
        for mark, rank in zip(MARKS[style], marked, strict=False):
            if own == rank:
                cells[method] = mark.format(cells[method])
    return cells


def number(value: float, digits: int | None = None) -> str:
    """A value with `digits` after the point, else with some five that count; empty for NaN."""
    if math.isnan(value):
        return ""
    if digits is not None:
        return f"{value:.{digits}f}"
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
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", body[0], r"\hline"]
    return "\n".join([*top, *body[1:], r"\hline", r"\end{tabular}", ""])


FORMATS = {"plain": aligned, "terminal": aligned, "markdown": _markdown, "latex": _latex}


def print_table(result: Comparison, rank: bool = False, file: TextIO | None = None) -> None:
    """The table of means, in blocks that fit the terminal; bold and underlined if it is one."""
    file = file or sys.stdout
    print(head_line(result), file=file)
    print_rows(rows_of(result, rank), list(result.values), file)


def print_rows(rows: list[Row], methods: Sequence[str], file: TextIO) -> None:
    """The table of some rows, in blocks of methods that fit the terminal."""
    colour = file.isatty() and "NO_COLOR" not in os.environ
    width = max(10, *map(len, methods)) + 2
    label = max(12, *(len(row.label) for row in rows)) + 2
    block = max(1, (shutil.get_terminal_size().columns - label) // width)
    for k in range(0, len(methods), block):
        shown = methods[k : k + block]
        print(table_of(rows, "terminal" if colour else "plain", shown), file=file)


def head_line(result: Comparison) -> str:
    """What a table of means is of: the title, how many images and, where known, people."""
    where = images_and_people(len(result.images), "images", result.people)
    return f"{result.title}: means over {where}".lstrip(": ")


def images_and_people(count: int, images: str, people: Iterable[str]) -> str:
    """Such as "24 images of 10 people"; without people where nobody knows them."""
    persons = len(set(people))
    of_people = f" of {persons} {'person' if persons == 1 else 'people'}" if persons else ""
    return f"{count} {images}{of_people}"


def print_differences(result: Comparison, rows: list[Difference], between: Sequence[str]) -> None:
    """The rows of `differences` between two methods of the comparison."""
    over = " over people" if result.people else ""
    lines = [["metric", visible(" - ".join(between)), f"95 % interval{over}", "p", "p (Holm)"]]
    for row in rows:
        limits = "" if math.isnan(row.low) else f"{number(row.low)} .. {number(row.high)}"
        label = f"{row.metric} {result.metrics[row.metric].arrow}"
        lines.append([label, number(row.mean), limits, f"{row.p:.2g}", f"{row.p_holm:.2g}"])
    print(aligned(lines))


# --- files -----------------------------------------------------------------------------------


def check_outputs(files: dict[str, Path]) -> None:
    """UserError if two outputs have one name, the folder of one is not there, or no plot is made.

    `files` are paths by what they hold, as "csv" or "plot".
    """
    if len(set(files.values())) < len(files):
        raise UserError(f"two outputs have one name: {', '.join(map(str, files.values()))}")
    for path in files.values():
        if not path.parent.is_dir():
            raise UserError(f"the folder of {path} is not there, expected an existing one")
    if "plot" in files:
        check_plot_format(files["plot"].suffix.lstrip("."))


def check_plot_format(suffix: str) -> None:
    """UserError if Matplotlib has no such format."""
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    if suffix.lower() not in (formats := Figure().canvas.get_supported_filetypes()):
        raise UserError(f"a plot cannot be {suffix!r}, expected one of {', '.join(formats)}")


def write_files(
    result: Comparison,
    files: dict[str, Path],
    rank: bool = False,
    rows: Sequence[Difference] = (),
    between: Sequence[str] = (),
) -> None:
    """Write a comparison as the files of `check_outputs`."""
    makers = {
        "csv": lambda _: to_csv(result),
        "json": lambda _: to_json(result, rank, rows, between),
        "markdown": lambda _: table(result, "markdown", rank),
        "latex": lambda _: table(result, "latex", rank),
        "plot": lambda path: plot(result, path.suffix.lstrip(".")),
    }
    write_made(files, makers)


def write_made(files: dict[str, Path], makers: dict[str, Callable[[Path], str | bytes]]) -> None:
    """Write what each file's maker makes of its path; nothing before all of it is made."""
    contents = {path: makers[name](path) for name, path in files.items()}
    for path, content in contents.items():
        write_bytes(path, content if isinstance(content, bytes) else content.encode("utf-8"))


def to_csv(result: Comparison) -> str:
    """Each image of each method, then the means; empty where an image has no value.

    Where the people are known, a column names them, and each of them has a line of means.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *["person"] * bool(result.people), "image", *result.metrics])
    for method, values in result.values.items():
        rows = list(zip(result.images, result.people or result.images, values, strict=True))
        if result.people:
            rows += [("mean", who, row) for who, row in result.means_by_person(method).items()]
        for image, person, row in (*rows, ("mean", "all", result.mean(method))):
            cells = ("" if math.isnan(value) else repr(float(value)) for value in row)
            writer.writerow([method, *[person] * bool(result.people), image, *cells])
    return text.getvalue()


def to_json(
    result: Comparison,
    rank: bool,
    rows: Sequence[Difference],
    between: Sequence[str],
    more: dict[str, dict] | None = None,
) -> str:
    """The same with ranks and differences; what JSON has no number for (NaN, infinity) is null.

    `more` has further entries of each method by their name, as {"kept": {method: value}}.
    """

    def by_metric(values: ndarray) -> dict[str, float | None]:
        return finite(dict(zip(result.metrics, values.tolist(), strict=True)))

    document = {
        "title": result.title,
        "higher_is_better": {name: m.higher_is_better for name, m in result.metrics.items()},
        "methods": {
            method: {
                "mean": by_metric(result.mean(method)),
                "images": {i: by_metric(v) for i, v in zip(result.images, values, strict=True)},
                **{name: of_methods[method] for name, of_methods in (more or {}).items()},
            }
            for method, values in result.values.items()
        },
    }
    if result.people:
        document["people"] = dict(zip(result.images, result.people, strict=True))
    if rank:
        document["mean_rank"] = result.mean_ranks()
    if rows:
        metrics = [finite(asdict(row)) for row in rows]
        document["difference"] = {"between": list(between), "metrics": metrics}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def finite(values: dict) -> dict:
    """The same with None for NaN and infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def plot(result: Comparison, suffix: str, seed: int = 0) -> bytes:
    """A small panel for each metric: a dot for each image, a bar at the mean.

    Where several people are known, a line shows the 95 % interval over them. `suffix` is a format
    of Matplotlib's, as "png" or "pdf".
    """
    from matplotlib.figure import Figure  # only --plot needs it, and it loads slowly

    columns = min(5, len(result.metrics))
    rows = math.ceil(len(result.metrics) / columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    methods = list(result.values) if result.people else []
    drawn = {method: result.resampled(method, seed) for method in methods}
    for k, panel in enumerate(panels):
        if k < len(result.metrics):
            limits = {method: interval(draws[:, k]) for method, draws in drawn.items()}
            _plot_metric(panel, result, k, limits)
        else:
            panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 8), fontsize=8
    )
    image = io.BytesIO()
    figure.savefig(image, format=suffix, dpi=150)
    return image.getvalue()


def _plot_metric(panel, result: Comparison, k: int, limits: dict[str, tuple[float, float]]) -> None:
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
        if method in limits:
            panel.plot([x, x], limits[method], color="black", linewidth=1)
