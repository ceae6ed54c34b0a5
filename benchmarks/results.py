"""Measure all test-split tables into docs/results.csv, and write them into the texts.

    python benchmarks/results.py --fused AdaFuse=published/AdaFuse TEA-Net=published/TEA-Net
    python benchmarks/results.py --texts

The first fuses the test split with the shipped weights (`ours`), and with their gains set to zero
(`blend`), so that one sees what the network adds; it measures both, the trivial fusions and the
folders that are named. A folder holds <task>/<name>.png. A method that was measured before and is
not named now keeps its rows. A few minutes of one core. The second only writes the texts.

In a text, a table stands between <!-- table: NAME --> and <!-- end -->.
"""

import argparse
import csv
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import ROOT, make_parser

import evaluation.findings as planted
import evaluation.one_source_tables as own_content
from args_setting import DATA_DIR, TASKS
from cli import UserError, file_hash, run_script
from dataset import Pair, case_of, people, read_pair, task_pairs
from evaluation.compare import Comparison, Files, name_folders
from evaluation.methods import Method, trivial_methods
from evaluation.tables import FORMATS, table
from evaluation.trivial import TRIVIAL
from images import read_luma8, to_uint8, write_bytes, write_png
from inference import optimise
from metrics import METRICS, PANEL, compare
from network import HEADS
from weights import load_weights, shipped_path

CSV = ROOT / "docs" / "results.csv"
TEXTS = (ROOT / "docs" / "results.md", ROOT / "model_pre" / "README.md", ROOT / "README.md")
MARKED = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OURS = ("ours", "blend")
SEED = 3407
BONE = 250  # levels of the CT


class Row(NamedTuple):
    """One figure: the mean over the images of a task, and its 95 % interval over people."""

    task: str
    view: str  # metrics, one source, findings, bone or about
    method: str
    value: str
    mean: float | str  # text in the view `about`
    low: float = math.nan
    high: float = math.nan


Found = dict[tuple[str, str], dict[str, dict[str, Row]]]  # (task, view) -> method -> value -> row


# --- measuring -------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows of the methods that are fused here or named as folders."""
    rows, used = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for task in TASKS:
            pairs = task_pairs(args.data_dir, task, "test")
            path = args.weights or shipped_path("compact", task)
            used.append(file_hash(path))
            methods = network_methods(path)
            folder = Path(temporary) / task
            files = {m: write_fused(folder / m, fuse, pairs) for m, fuse in methods.items()}
            for name, named in name_folders(args.fused).items() if args.fused else ():
                files[name] = {p.name: named / task / f"{p.name}.png" for p in pairs}
            rows += measure_task(task, pairs, files, methods | trivial_methods(), args)
    about = {"date": str(date.today()), "weights": " ".join(dict.fromkeys(used))}
    return [*rows, *(Row("", "about", "", name, text) for name, text in about.items())]


def network_methods(path: Path) -> dict[str, Method]:
    """The network of a file of weights, and what it would make with its gains set to zero."""
    model, _ = load_weights(path)
    fast = optimise(model)

    @torch.inference_mode()
    def without_gains(luma1: np.ndarray, luma2: np.ndarray) -> np.ndarray:
        images = [torch.from_numpy(luma)[None, None] for luma in (luma1, luma2)]
        gains = torch.zeros(1, HEADS[model.size.head], *luma1.shape)
        return model.head(gains, *images)[0, 0].clamp(0, 1).numpy()

    return {"ours": lambda a, b: fast.fuse(a, b).numpy(), "blend": without_gains}


def write_fused(folder: Path, fuse: Method, pairs: list[Pair]) -> Files:
    """Fuse all pairs into a folder, as test_asfe.py would."""
    folder.mkdir(parents=True)
    files = {}
    for pair in pairs:
        luma1, luma2, chroma = read_pair(pair)
        files[pair.name] = folder / f"{pair.name}.png"
        write_png(files[pair.name], to_uint8(fuse(luma1, luma2), chroma))
    return files


def measure_task(
    task: str,
    pairs: list[Pair],
    files: dict[str, Files],
    methods: dict[str, Method],
    args: argparse.Namespace,
) -> list[Row]:
    """All rows of one task."""
    listed = people(args.data_dir)
    who = {pair.name: listed.get((task, case_of(pair)), case_of(pair)) for pair in pairs}
    print(f"{task}: {len(pairs)} pairs of {len(set(who.values()))} people", flush=True)
    rows = [
        Row(task, "metrics", method, name, float(mean))
        for method, means in means_of(compare(files, pairs, args.jobs, title=task)).items()
        for name, mean in means.items()
    ]
    result = own_content.compare_one_source(files, pairs, args.jobs, task).with_people(who)
    result = own_content.without_uptake(result) if task == "CT-MRI" else result
    for method in result.values:
        means = own_content.with_worse(result.mean(method), list(result.metrics))
        for name, limits in own_content.intervals(result, method, SEED).items():
            rows.append(Row(task, "one source", method, name, float(means[name]), *limits))
    for method, fuse in methods.items():
        found = planted.measure_findings(fuse, pairs, SEED, method)
        values = planted.summary(found, task, who, SEED)
        limits = {"worst kind": (values.pop("low"), values.pop("high"))}
        for name, value in values.items():
            rows.append(Row(task, "findings", method, name, value, *limits.get(name, ())))
    return rows + (bone_rows(task, pairs, files) if task == "CT-MRI" else [])


def means_of(result: Comparison) -> dict[str, dict[str, float]]:
    return {m: dict(zip(result.metrics, result.mean(m), strict=True)) for m in result.values}


def bone_rows(task: str, pairs: list[Pair], files: dict[str, Files]) -> list[Row]:
    """How white bone is: the mean level of each slice, the mean of them and the darkest."""
    rows = []
    for method, of_method in files.items():
        levels = []
        for pair in pairs:
            bone = read_luma8(pair.path1) >= BONE
            levels.append(read_luma8(of_method[pair.name])[bone].mean() if bone.any() else np.nan)
        rows.append(Row(task, "bone", method, "mean", float(np.nanmean(levels))))
        rows.append(Row(task, "bone", method, "darkest slice", float(np.nanmin(levels))))
    return rows


# --- the file --------------------------------------------------------------------------------


def read_rows(path: Path | None = None) -> list[Row]:
    """The rows of a file that `to_csv` made, by default of CSV; none if it is not there."""
    path = path or CSV
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for *words, mean, low, high in list(csv.reader(file))[1:]:
            value = mean if words[1] == "about" else number(mean)
            rows.append(Row(*words, value, number(low), number(high)))
    return rows


def number(text: str) -> float:
    return float(text) if text else math.nan


def to_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV; empty where there is no value. Ten digits, so that ties stay ties."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        cells = [f"{v:.10g}" if isinstance(v, float) else v for v in row]
        writer.writerow(["" if cell == "nan" else cell for cell in cells])
    return text.getvalue()


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The new rows, and the old ones of methods that were not measured now."""
    again = {(row.task, row.view, row.method) for row in new}
    kept = [row for row in old if (row.task, row.view, row.method) not in again]
    return sorted([*new, *kept], key=place)


def place(row: Row) -> tuple:
    """Where a row stands in the file: the order of methods in every table follows."""
    known = [*OURS, *TRIVIAL]
    rank = known.index(row.method) if row.method in known else len(known)
    views = ("metrics", "one source", "findings", "bone", "about")
    tasks = [*TASKS, ""]
    return tasks.index(row.task), views.index(row.view), rank, row.method


# --- the tables ------------------------------------------------------------------------------


def by_view(rows: Iterable[Row]) -> Found:
    found: Found = {}
    for row in rows:
        found.setdefault((row.task, row.view), {}).setdefault(row.method, {})[row.value] = row
    return found


def tables_of(rows: Iterable[Row]) -> dict[str, str]:
    """Every table of the texts by its name, as Markdown."""
    found = by_view(rows)
    tables = {}
    for task in TASKS:
        tables[f"metrics {task}"] = table(metric_means(found, task), "markdown", rank=True)
        tables[f"one source {task}"] = one_source_table(found, task)
        tables[f"findings {task}"] = FORMATS["markdown"](planted.table_lines(findings(found, task)))
    tables["ours"] = task_table(found, ["ours"])
    tables["what the network adds"] = task_table(found, OURS)
    tables["intervals"] = interval_table(found)
    tables["findings of ours"] = findings_of_ours(found)
    tables["metrics better than"] = wins_table(found)
    tables["bone"] = bone_table(found)
    about = found["", "about"][""]
    tables["measured"] = f"*Measured {about['date'].mean}, `python benchmarks/results.py`.*\n"
    return tables


def metric_means(found: Found, task: str) -> Comparison:
    """The means of the panel as a comparison of one image."""
    methods = found[task, "metrics"]
    values = {m: np.array([[rows[n].mean for n in PANEL]]) for m, rows in methods.items()}
    return Comparison(task, {name: METRICS[name] for name in PANEL}, ["mean"], values)


def one_source_table(found: Found, task: str) -> str:
    methods = found[task, "one source"]
    names = [n for n in own_content.VALUES if n in methods["ours"]]
    values = {m: np.array([[rows[n].mean for n in names]]) for m, rows in methods.items()}
    metrics = {name: own_content.VALUES[name] for name in names}
    result = Comparison(task, metrics, ["mean"], values)
    return own_content.one_source_table(result, (TASKS[task], "MRI"), "markdown")


def findings(found: Found, task: str) -> dict[str, dict[str, float]]:
    """The summaries of the methods, as `evaluation.findings.summary` made them."""
    summaries = {}
    for method, rows in found[task, "findings"].items():
        worst = rows["worst kind"]
        limits = {"low": worst.low, "high": worst.high}
        summaries[method] = {name: row.mean for name, row in rows.items()} | limits
    return summaries


class Column(NamedTuple):
    """A column of a table of tasks."""

    title: str
    view: str
    value: str
    digits: int


COLUMNS = (
    *(Column(f"{name} ↑", "metrics", name, 3) for name in ("SSIM", "VIF", "Qabf")),
    Column("kept ↑", "one source", "kept", 2),
    Column("conspicuous ↑", "one source", "conspicuous", 2),
    Column("opposed ↑", "one source", "opposed", 2),
    Column("foreign ↓", "one source", "foreign", 2),
    Column("brighter ↓", "one source", "brighter", 3),
    Column("rise ↓", "one source", "rise", 0),
    Column("hue ↓", "one source", "hue", 1),
    Column("findings ↑", "findings", "worst kind", 2),
)


def task_table(found: Found, methods: Iterable[str]) -> str:
    """A line for each task and method; kept, conspicuous and findings are those of the worse."""
    methods = list(methods)

    def cell(row: Row | None, digits: int) -> str:
        return "" if row is None or math.isnan(row.mean) else f"{row.mean:.{digits}f}"

    lines = [["", *["method"] * (len(methods) > 1), *(column.title for column in COLUMNS)]]
    for task in TASKS:
        for method in methods:
            cells = [cell(found[task, c.view][method].get(c.value), c.digits) for c in COLUMNS]
            lines.append([task, *[method] * (len(methods) > 1), *cells])
    return FORMATS["markdown"](lines)


def interval_table(found: Found) -> str:
    """The values of ours with their intervals over people; one person has none."""
    columns = [column for column in COLUMNS if column.view != "metrics"]
    lines = [["", *(column.title for column in columns)]]
    for task in TASKS:
        cells = []
        for column in columns:
            row = found[task, column.view]["ours"].get(column.value)
            known = row is not None and not math.isnan(row.low)
            limits = (f"{v:.{column.digits}f}" for v in (row.low, row.high)) if known else ()
            cells.append(" to ".join(limits))
        lines.append([task, *cells])
    return FORMATS["markdown"](lines)


def findings_of_ours(found: Found) -> str:
    """A line for each task; its kinds are by source 1 and MRI."""
    worst = ("worst kind", "worst tenth", "visible")
    lines = [["test split", "source 1 +", "source 1 −", "MRI +", "MRI −", *worst]]
    for task in TASKS:
        rows = found[task, "findings"]["ours"]
        shown = [*list(rows)[:4], *worst]  # the four kinds come first
        lines.append([task, *(f"{rows[name].mean:.2f}" for name in shown)])
    return FORMATS["markdown"](lines)


def wins_table(found: Found) -> str:
    """In how many metrics of the panel ours is better than each other method."""
    others = [m for m in found["CT-MRI", "metrics"] if m != "ours"]
    lines = [[f"of {len(PANEL)} metrics", *others]]
    for task in TASKS:
        means = found[task, "metrics"]
        lines.append([task, *(str(wins(means["ours"], means[other])) for other in others)])
    return FORMATS["markdown"](lines)


def wins(ours: dict[str, Row], other: dict[str, Row]) -> int:
    better: dict[bool, Callable] = {True: float.__gt__, False: float.__lt__}
    return sum(
        better[METRICS[name].higher_is_better](ours[name].mean, other[name].mean) for name in PANEL
    )


def bone_table(found: Found) -> str:
    """The level of bone in CT-MRI, of 255."""
    methods = found["CT-MRI", "bone"]
    lines = [["level of bone, of 255", *methods]]
    for value in ("mean", "darkest slice"):
        lines.append([value, *(f"{rows[value].mean:.0f}" for rows in methods.values())])
    return FORMATS["markdown"](lines)


# --- the texts -------------------------------------------------------------------------------


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with its tables made anew; UserError if it names one that there is not."""

    def new(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in tables:
            raise UserError(f"no table {name!r}, expected one of {', '.join(tables)}")
        return f"{start}\n{tables[name]}\n{end}"

    return MARKED.sub(new, text)


def main(args: argparse.Namespace) -> None:
    rows = read_rows()
    if not args.texts:
        rows = merged(rows, measure(args))
        write_bytes(CSV, to_csv(rows).encode())
    tables = tables_of(read_rows())
    for path in TEXTS:
        old = path.read_text(encoding="utf-8")
        new = filled(old, tables)
        if new != old:
            write_bytes(path, new.encode())
            print(f"written: {path.relative_to(ROOT)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--fused", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--weights", type=Path, help="of ours; without it the shipped ones")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one for each core")
    parser.add_argument("--texts", action="store_true", help="measure nothing, write the texts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
