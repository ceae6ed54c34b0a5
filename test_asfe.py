"""Fuse image pairs with trained weights and write them as PNG, with a contact sheet to look at.

    python test_asfe.py --demo                                three drawn phantom pairs
    python test_asfe.py --task PET-MRI                        the test split of HMIFDatasets/
    python test_asfe.py --img1 ct.png --img2 mri.png --out fused.png
    python test_asfe.py --dir1 pet/ --dir2 mri/ --out fused/  two folders, paired by file name
    python test_asfe.py --img1 ct.nii.gz --img2 dicom/ --out fused.nii.gz    volumes, see volumes/

Source 1 is CT, PET or SPECT, source 2 is MRI; --task all takes the weights for pairs of any other
kind. Colour is fused as luma and gets its chroma back. Settings: args_setting.py.

This file turns flags into requests and prints results. fusing.py and volumes/ do the work.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from args_setting import ROOT, TASKS, TestArgs
from cli import (
    UserError,
    check_mode,
    command_line,
    installed,
    run_script,
    say,
    setup_runtime,
    stem_of,
)

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(TestArgs, __doc__, check_mode)

import numpy as np
import torch
from tqdm import tqdm

from dataset import Pair, as_told, match_pairs, task_pairs
from evaluation.sheets import contact_sheet
from fusing import FusedImage, ImageRequest, Output, Shift, fuse_images, image_request_from
from images import Doubts, luma8, luma8_of, luma_and_chroma, to_uint8, writable_folder, write_png
from inference import optimise
from phantom import phantom_pair
from weights import load_model


def main(args: TestArgs) -> None:
    mode = check_mode(args)
    device = setup_runtime(args)
    if mode == "the demo":
        fuse_demo(args, device)
    elif mode == "volumes":
        fuse_pair_of_volumes(args, device)
    elif mode == "one pair of images":
        fuse_one(args, device)
    elif mode == "two folders":
        pairs = match_pairs(args.dir1, args.dir2, args.skip_unmatched)
        fuse_folder(args, pairs, args.out, device)
    else:
        if args.task == "all":
            raise UserError("task all has no test split: give a task, or pairs of images")
        how = args.skip_unmatched, args.cases, args.case_pattern
        pairs = task_pairs(args.data_dir, args.task, "test", *how)
        fuse_folder(args, pairs, args.out or ROOT / "result" / args.task, device)


# --- images ----------------------------------------------------------------------------------


def fuse_one(args: TestArgs, device: torch.device) -> None:
    """Fuse --img1 and --img2 into the file --out."""
    [pair] = as_told([Pair(stem_of(args.img1), args.img1, args.img2)], args.levels, args.page)
    request = image_request_from(pair, vars(args))
    request.plan()  # says at once if --out is no PNG
    model = optimise(load_model(args, args.task, device))
    [fused] = fuse_images([request], model)
    tell_oddities([fused.odd], args.task)
    say_once(fused.notes)
    if fused.shift:
        say(line_of(fused.shift))
    for what, path in fused.files.items():
        say(f"{what}: {path}")
    if args.metrics:
        print_metrics({pair.name: lumas(fused)}, args.task)


def line_of(shift: Shift) -> str:
    """What the registration of two images found, in a line."""
    line = f"img2 lies {shift.moved_pixels:.1f} pixels off"
    if shift.applied:
        doubts = "".join(f"; forced (registration): {doubt}" for doubt in shift.doubts)
        return f"{line}: moved{doubts}"
    doubts = f"; not to be trusted: {'; '.join(shift.doubts)}" if shift.doubts else ""
    return f"{line}, nothing was moved{doubts}"


def fuse_folder(args: TestArgs, pairs: list[Pair], out: Path, device: torch.device) -> None:
    """Fuse pairs into the folder `out` and draw a contact sheet beside it."""
    out = Path(os.path.realpath(out))
    sheet = out.with_name(f"{out.name or 'fused'}_contact_sheet.png")
    shown = np.linspace(0, len(pairs) - 1, min(args.contact_rows, len(pairs))).round()
    shown = {pairs[int(i)].name for i in shown}
    requests = [
        ImageRequest(
            pair, out / f"{pair.name}.png", args.task, stretch=args.stretch, of_folders=True
        )
        for pair in as_told(pairs, args.levels, args.page)
    ]
    model = optimise(load_model(args, args.task, device))
    also = [Output("contact sheet", sheet, replaces=True)] if shown else []
    results = fuse_images(requests, model, args.batch_size, also)
    rows, odd, samples, notes = [], [], {}, []
    started = time.perf_counter()
    for fused in tqdm(results, total=len(pairs), unit="pair", desc=f"{args.size} {args.task}"):
        name = fused.request.pair.name
        odd.append(fused.odd)
        notes += fused.notes
        if name in shown:
            rows.append((name, views(fused)))
        if args.metrics:
            samples[name] = lumas(fused)
    tell_oddities(odd, args.task)
    say_once(notes)
    say(f"{len(pairs)} pairs in {time.perf_counter() - started:.1f} s: {out}")
    if rows:
        titles = ["source 1", "source 2"] if args.task == "all" else [TASKS[args.task], "MRI"]
        write_png(sheet, contact_sheet(rows, [*titles, "fused"]))
        say(f"contact sheet: {sheet}")
    if args.metrics:
        print_metrics(samples, args.task)


def fuse_demo(args: TestArgs, device: torch.device) -> None:
    """Draw a phantom pair for each task, fuse it with the task's weights, and show all three."""
    models = {task: optimise(load_model(args, task, device)) for task in TASKS}
    out = writable_folder(args.out or ROOT / "result" / "demo")
    rows, samples = [], {}
    for task, model in tqdm(models.items(), unit="pair", desc="phantoms"):
        paths = [out / f"{task}_{modality}.png" for modality in (TASKS[task], "MRI")]
        for path, image in zip(paths, phantom_pair(task), strict=True):
            write_png(path, image)
        request = ImageRequest(
            Pair(task, *paths), out / f"{task}_fused.png", task, stretch=args.stretch
        )
        [fused] = fuse_images([request], model)
        rows.append((task, views(fused)))
        samples[task] = lumas(fused)
    sheet = out / "contact_sheet.png"
    write_png(sheet, contact_sheet(rows, ["CT / PET / SPECT", "MRI", "fused"]))
    say(f"look at {sheet}")
    if args.metrics:
        print_metrics(samples, "phantoms")


def say_once(lines: Iterable[str]) -> None:
    """Print each of these lines once."""
    for line in dict.fromkeys(lines):
        say(line)


def views(fused: FusedImage) -> list[np.ndarray]:
    """Both sources and the fused image in 8 bits, grey or RGB."""
    return [*(to_uint8(*luma_and_chroma(pixels)) for pixels in fused.sources), fused.image]


def lumas(fused: FusedImage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma (H, W) of both sources and of the fused image, in 8 bits, as the metrics take it."""
    return (*map(luma8, fused.sources), luma8_of(fused.image))


def tell_oddities(found: Sequence[dict[str, list[str]]], task: str) -> None:
    """Print what is odd about the sources: the first line of each kind."""
    doubts = Doubts(task)
    for odd in found:
        doubts.add_all(odd)
    for note in doubts.notes():
        say(note)


def print_metrics(samples: dict[str, tuple], title: str) -> None:
    """The table of metrics.py for what was just fused, see `lumas`."""
    from evaluation.compare import Sample  # only --metrics needs these, and they load slowly
    from evaluation.tables import print_table
    from metrics import compare_lumas

    named = {
        name: Sample(source1, source2, {"ASFE-Fusion": fused})
        for name, (source1, source2, fused) in samples.items()
    }
    print_table(compare_lumas(named, title))


# --- volumes ---------------------------------------------------------------------------------


def fuse_pair_of_volumes(args: TestArgs, device: torch.device) -> None:
    """Fuse the volumes --img1 and --img2 into the file --out."""
    with installed("volumes need"):
        from volumes import fuse_volumes, request_from, use_threads
    request = request_from(vars(args))
    use_threads(args.threads)
    model = optimise(load_model(args, args.task, device))
    fused = fuse_volumes(request, model, say, slice_bar(f"{args.size} {args.task}"))
    for what, paths in fused.files.items():
        say(f"{what}: {paths[0].parent if what in ('png', 'dicom') else paths[0]}")


def slice_bar(title: str) -> Callable[[int, int], None]:
    """A progress bar that begins with the first slices: it takes how many are done, and of many."""
    bars: list[tqdm] = []

    def show(done: int, count: int) -> None:
        if not bars:
            bars.append(tqdm(total=count, unit="slice", desc=title))
        bars[0].update(done - bars[0].n)
        if done == count:
            bars[0].close()

    return show


if __name__ == "__main__":
    run_script(main, ARGS)
