"""The report of a study: a table, and one page that needs nothing else, failures on top.

The pictures lie in the page as JPEG, small enough that 200 cases open in a browser at once.

Legend: H W pixels; images are uint8, (H, W, 3) RGB.
"""

import base64
import csv
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np

from cli import UserError
from evaluation.sheets import contact_sheet
from fusing import ImageRequest
from images import read_uint8, write_bytes
from studies.cases import Case

WIDTH = 520  # pixels of a picture at most
COLUMNS = ("name", "status", "task", "seconds", "moved_mm", "moved_pixels")
COLUMNS += ("measured", "coverage_percent", "doubts", "message", "img1", "img2", "out")
ORDER = ("failed", "not run", "done")
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; background: #14161a; color: #e6e6e6 }
a { color: #8ec7ff } h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 0 0 .3em }
table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: .8em }
article { background: #20242b; padding: .8em; border-radius: 6px; overflow-wrap: anywhere }
article { scroll-margin-top: 1em } article:target { outline: 2px solid #8ec7ff }
img { max-width: 100%; display: block; margin-top: .4em }
.failed { color: #ff8f84 } .bad { color: #ffc66d } p, ul { margin: .2em 0 }
td, li { overflow-wrap: anywhere } table, main, details { margin-top: 1em }
"""


def write_report(
    out: Path, cases: list[Case], records: dict[str, dict], left_out: Sequence[str] = ()
) -> Path:
    """Write report.csv and report.html into `out`, each whole or not at all; the page's path.

    Args:
        records: those of `run_case` by the name of the case; a case without one was not run.
        left_out: lines for the page on files that are there and are no part of a case.
    """
    rows = [row_of(case, records.get(case.name)) for case in cases]
    rows.sort(key=lambda row: (ORDER.index(row["status"]), not row["doubts"]))  # else as before
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_bytes(out / "report.csv", text.getvalue().encode())
    by_name = {case.name: case for case in cases}
    shown = [row for row in rows if row["status"] == "done"]
    articles = [article(r, by_name[r["name"]], records[r["name"]], out) for r in shown]
    page = page_of(rows, articles, left_out)
    write_bytes(out / "report.html", page.encode())
    return out / "report.html"


def row_of(case: Case, record: dict | None) -> dict:
    """The cells of a case; what was not found is empty."""
    record = record or {"status": "not run", "message": ""}
    found = record.get("found", {}) if record["status"] == "done" else {}
    apart, pixels, share = (found.get(k) for k in ("apart_mm", "apart_pixels", "coverage"))
    applied = found.get("applied", True)
    img1, img2, *_ = case.request.sources
    return {
        "name": case.name,
        "status": record["status"],
        "task": case.request.task,
        "seconds": record.get("seconds", ""),
        "moved_mm": round(apart, 2) if applied and apart is not None else "",
        "moved_pixels": round(pixels, 2) if applied and pixels is not None else "",
        "measured": "" if applied else measured(apart, pixels),
        "coverage_percent": "" if share is None else round(100 * share),
        "doubts": "; ".join(found.get("doubts", [])),
        "message": record["message"],
        "img1": img1,
        "img2": img2,
        "out": result_of(case),
    }


def measured(mm: float | None, pixels: float | None) -> str:
    """How far apart two sources were found that stayed where they are; empty if nobody looked."""
    if mm is None and pixels is None:
        return ""
    found = f"{pixels:.2f} pixels" if mm is None else f"{mm:.2f} mm"
    return f"measured {found} apart, not moved"


def result_of(case: Case) -> Path:
    """The fused image or volume of a case."""
    return case.request.plan().outputs[0].path


# --- the page --------------------------------------------------------------------------------


def page_of(rows: list[dict], articles: list[str], left_out: Sequence[str]) -> str:
    """The whole page: counts, failures, doubts, what is left out, an article for each case done."""
    of = {status: [row for row in rows if row["status"] == status] for status in ORDER}
    doubtful = [row for row in of["done"] if row["doubts"]]
    slowest = sorted(of["done"], key=lambda row: -row["seconds"])[:3]
    failures = "".join(line(escape(row["name"]), row["message"]) for row in of["failed"])
    doubts = "".join(line(link(row["name"]), row["doubts"]) for row in doubtful)
    slow = ", ".join(f"{link(row['name'])} ({row['seconds']:.1f} s)" for row in slowest)
    left = ", ".join(escape(row["name"]) for row in of["not run"])
    files = "".join(f"<li>{escape(text)}</li>" for text in left_out)
    counts = ", ".join(f"{len(of[status])} {status}" for status in ("done", "failed", "not run"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fused study</title>'
        f"<style>{STYLE}</style></head><body><h1>{len(rows)} cases: {counts}</h1>"
        + (f'<table class="failed">{failures}</table>' if failures else "")
        + (f'<table class="bad">{doubts}</table>' if doubts else "")
        + (f"<p>Not run: {left}</p>" if left else "")
        + (f"<p>Slowest: {slow}</p>" if slow else "")
        + (f"<details open><summary>Left out</summary><ul>{files}</ul></details>" if files else "")
        + f"<main>{''.join(articles)}</main></body></html>\n"
    )


def line(heading: str, text: str) -> str:
    """A row of a table; `heading` is HTML."""
    return f"<tr><th>{heading}</th><td>{escape(text)}</td></tr>"


def link(name: str) -> str:
    """A link to the article of a case."""
    return f'<a href="#{quote(name)}">{escape(name)}</a>'


def article(row: dict, case: Case, record: dict, out: Path) -> str:
    """What the page shows of a case that is done."""
    facts = [row["task"], f"{row['seconds']:.1f} s"]
    if row["moved_mm"] != "":
        facts.append(f"moved {row['moved_mm']} mm")
    if row["moved_pixels"] != "":
        facts.append(f"moved {row['moved_pixels']} pixels")
    if row["measured"]:
        facts.append(row["measured"])
    if row["coverage_percent"] != "":
        facts.append(f"coverage {row['coverage_percent']} %")
    text = f"<p>{escape(' · '.join(facts))}</p>"
    if row["doubts"]:
        text += f'<p class="bad">{escape(row["doubts"])}</p>'
    for note in record.get("found", {}).get("notes", ()):
        text += f"<p>{escape(note)}</p>"
    text += "".join(embedded(*picture) for picture in pictures(case, record))
    file = quote(Path(os.path.relpath(row["out"], out)).as_posix())
    name = escape(row["name"])
    return f'<article id="{name}"><h2><a href="{file}">{name}</a></h2>{text}</article>'


def pictures(case: Case, record: dict) -> list[tuple[str, np.ndarray]]:
    """Titles and images of a case: its mosaic, or sources and result; and its registration."""
    folder = case.record.parent
    written = {os.path.realpath(folder / name) for name in record.get("outputs", ())}
    plan = case.request.plan()
    shown = {what: path for what in ("mosaic", "overlay", "moved source 2")
             if (path := plan.path(what)) and os.path.realpath(path) in written}  # fmt: skip
    found = []
    if isinstance(case.request, ImageRequest):
        pair = case.request.pair
        paths = pair.path1, shown.get("moved source 2", pair.path2), case.request.out
        images = [image for image in map(picture, paths) if image is not None]
        if len(images) == 3:
            sheet = contact_sheet([(case.name, images)], ["source 1", "source 2", "fused"])
            found.append(("sources and fused", sheet))
    for what, title in (("mosaic", "fused"), ("overlay", "registration")):
        if what in shown and (image := picture(shown[what])) is not None:
            found.append((title, image))
    return found


def picture(path: Path) -> np.ndarray | None:
    """An image, or None where there is none to show."""
    try:
        return read_uint8(path)
    except (UserError, OSError):
        return None


def embedded(title: str, image: np.ndarray) -> str:
    """An image as JPEG inside of the page, at most WIDTH wide."""
    scale = min(1, WIDTH / image.shape[1])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    image = image if image.ndim == 2 else image[..., ::-1]
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    text = base64.b64encode(data.tobytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{text}">'
