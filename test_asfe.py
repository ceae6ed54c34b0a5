"""Fuse image pairs with trained weights and write them as PNG, with a contact sheet to look at.

    python test_asfe.py --demo                                three drawn phantom pairs
    python test_asfe.py --task PET-MRI                        the test split of HMIFDatasets/
    python test_asfe.py --img1 ct.png --img2 mri.png --out fused.png
    python test_asfe.py --dir1 pet/ --dir2 mri/ --out fused/  two folders, paired by file name
    python test_asfe.py --img1 ct.nii.gz --img2 dicom/ --out fused.nii.gz    volumes, see volumes/

Source 1 is CT, PET or SPECT, source 2 is MRI; --task all takes the weights for pairs of any other
kind. Colour is fused as luma and gets its chroma back. Settings: args_setting.py.

Legend: B pairs that go through the network together, H W pixels; images as in images.py.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import limits
from args_setting import ROOT, SIZES, TASKS, TestArgs
from cli import UserError, check_mode, command_line, run_script, setup_runtime

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(TestArgs, __doc__, check_mode)

import numpy as np
import torch
from tqdm import tqdm

from dataset import Pair, as_told, decode_pair, match_pairs, read_pair, task_pairs
from evaluation.sheets import contact_sheet
from images import (
    AS_STORED,
    Doubts,
    read_image,
    read_uint8,
    to_uint8,
    writable_folder,
    write_bytes,
    write_png,
)
from inference import optimise
from network import MIN_SIDE, ASFEFusion
from phantom import phantom_pair
from weights import load_model


def main(args: TestArgs, network: ASFEFusion | None = None) -> None:
    """Fuse what the settings name; for one pair, `network` may be at hand from the pair before."""
    mode = check_mode(args)
    device = setup_runtime(args)
    if mode == "the demo":
        fuse_demo(args, device)
    elif mode == "volumes":
        fuse_pair_of_volumes(args, device, network)
    elif mode == "one pair of images":
        fuse_one(args, device, network)
    elif mode == "two folders":
        pairs = match_pairs(args.dir1, args.dir2, args.skip_unmatched)
        fuse_folder(args, pairs, args.out, device)
    else:
        if args.task == "all":
            raise UserError("task all has no test split: give a task, or pairs of images")
        how = args.skip_unmatched, args.cases, args.case_pattern
        pairs = task_pairs(args.data_dir, args.task, "test", *how)
        fuse_folder(args, pairs, args.out or ROOT / "result" / args.task, device)


# --- fusing ----------------------------------------------------------------------------------


def fuse_pairs(
    model: ASFEFusion, pairs: list[Pair], batch_size: int, stretch: bool
) -> Iterator[tuple[Pair, np.ndarray]]:
    """Yield each pair with its fused image, uint8 (H, W) or RGB; equal sizes share a batch."""
    batch: list[tuple] = []  # (pair, luma1, luma2, chroma)

    def flush() -> Iterator[tuple[Pair, np.ndarray]]:
        if batch:
            luma1, luma2 = (np.stack([b[i] for b in batch])[:, None] for i in (1, 2))
            fused = model.fuse(luma1, luma2, stretch).cpu().numpy()  # (B, 1, H, W)
            for (pair, _, _, chroma), luma in zip(batch, fused[:, 0], strict=True):
                yield pair, to_uint8(luma, chroma)
            batch.clear()

    for pair in pairs:
        item = (pair, *read_pair(pair))
        if batch and (len(batch) == batch_size or batch[0][1].shape != item[1].shape):
            yield from flush()
        batch.append(item)
    yield from flush()


def check_pairs(pairs: list[Pair], outputs: list[Path], task: str, size: str = "") -> None:
    """Read every pair once before anything is written, so that bad input leaves no output.

    Nor may an output take the place of a source. What is odd about the sources is printed. With
    the size of a network that runs on the CPU, a pair must also fit into the memory that is free.
    """
    check_outputs(pairs, outputs)
    doubts = Doubts(task)
    for pair in pairs:
        height, width = decode_pair(pair, doubts)[0].values.shape[:2]
        if min(height, width) < MIN_SIDE:
            side = f"{MIN_SIDE}x{MIN_SIDE}"
            raise UserError(f"{pair.path1} is {height}x{width}, expected at least {side}")
        if size:
            limits.check_room(height, width, SIZES[size])
    doubts.tell()


def refuse_inside(out: Path, pairs: list[Pair]) -> None:
    """UserError if fused images would lie among the sources, where they would pass for some."""
    for folder in sorted({path.parent for pair in pairs for path in (pair.path1, pair.path2)}):
        if out.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"--out is {out}, inside of the source folder {folder}, choose another")


def check_outputs(pairs: list[Pair], outputs: list[Path]) -> None:
    """UserError if an output would take the place of a source."""
    sources = {os.path.realpath(path) for pair in pairs for path in (pair.path1, pair.path2)}
    for path in outputs:
        path.exists()  # OSError if the name is too long
        if os.path.realpath(path) in sources:
            raise UserError(f"{path} is a source and would be overwritten, choose another --out")


def fuse_folder(args: TestArgs, pairs: list[Pair], out: Path, device: torch.device) -> None:
    """Fuse pairs into the folder `out` and draw a contact sheet beside it."""
    out = Path(os.path.realpath(out))
    sheet = out.with_name(f"{out.name or 'fused'}_contact_sheet.png")
    pairs = as_told(pairs, args.levels, args.page)
    outputs = {pair.name: out / f"{pair.name}.png" for pair in pairs}
    written = [*outputs.values(), *([sheet] if args.contact_rows else [])]
    check_pairs(pairs, written, args.task, args.size if device.type == "cpu" else "")
    refuse_inside(out, pairs)
    model = optimise(load_model(args, args.task, device))
    writable_folder(out)
    shown = np.linspace(0, len(pairs) - 1, min(args.contact_rows, len(pairs))).round()
    shown = {pairs[int(i)].name for i in shown}
    rows = []
    started = time.perf_counter()
    with tqdm(total=len(pairs), unit="pair", desc=f"{args.size} {args.task}") as progress:
        for pair, fused in fuse_pairs(model, pairs, args.batch_size, args.stretch):
            write_png(outputs[pair.name], fused)
            if pair.name in shown:
                rows.append((pair.name, [*look_at(pair), fused]))
            progress.update()
    print(f"{len(pairs)} pairs in {time.perf_counter() - started:.1f} s: {out}")
    if rows:
        titles = ["source 1", "source 2"] if args.task == "all" else [TASKS[args.task], "MRI"]
        write_png(sheet, contact_sheet(rows, [*titles, "fused"]))
        print(f"contact sheet: {sheet}")
    if args.metrics:
        print_metrics(outputs, pairs, args.task)


def look_at(pair: Pair) -> list[np.ndarray]:
    """Both sources in 8 bits, grey or RGB."""
    return list(map(read_uint8, (pair.path1, pair.path2), pair.readings))


def fuse_one(args: TestArgs, device: torch.device, model: ASFEFusion | None = None) -> None:
    """Fuse --img1 and --img2 into the file --out."""
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise UserError(f"--out is {args.out}, expected a file name that ends in .png")
    pair = Pair(args.img1.stem, args.img1, args.img2)
    [pair] = as_told([pair], args.levels, args.page)
    if args.register not in ("auto", "off"):
        pair = registered(pair, args)
    check_pairs([pair], [args.out], args.task, args.size if device.type == "cpu" else "")
    model = model or optimise(load_model(args, args.task, device))
    writable_folder(Path(os.path.realpath(args.out)).parent)
    for _, fused in fuse_pairs(model, [pair], 1, args.stretch):
        write_png(args.out, fused)
    print(f"fused image: {args.out}")
    if args.metrics:
        print_metrics({pair.name: args.out}, [pair], args.task)


def registered(pair: Pair, args: TestArgs) -> Pair:
    """The pair with source 2 moved onto source 1 as `--register` says: written beside `--out`.

    The pair itself where it is only measured.
    """
    try:
        from volumes.flat import register_image
    except ModuleNotFoundError as error:
        raise UserError(
            f"--register needs {error.name}: pip install -r requirements-volumes.txt"
        ) from None
    moved, transform, picture = (
        args.out.with_name(args.out.stem + end)
        for end in ("_img2.png", ".tfm", "_registration.png")
    )
    check_outputs([pair], [args.out, moved, transform, picture])
    luma1, _ = read_image(pair.path1, pair.readings[0])
    luma2, chroma2 = read_image(pair.path2, pair.readings[1])
    done = register_image(luma1, luma2, chroma2, args.register, args.force)
    print(done.line)
    if done.text is None:
        return pair
    writable_folder(Path(os.path.realpath(args.out)).parent)
    write_png(moved, to_uint8(done.luma, done.chroma))
    write_bytes(transform, done.text)
    write_png(picture, done.picture)
    print(f"moved source 2: {moved}", f"transform: {transform}", f"overlay: {picture}", sep="\n")
    return pair._replace(path2=moved, readings=(pair.readings[0], AS_STORED))


def fuse_pair_of_volumes(
    args: TestArgs, device: torch.device, model: ASFEFusion | None = None
) -> None:
    """Hand --img1 and --img2 over to volumes/, whose packages are an extra."""
    try:
        from volumes import fuse_volumes
    except ModuleNotFoundError as error:
        raise UserError(
            f"volumes need {error.name}: pip install -r requirements-volumes.txt"
        ) from None
    fuse_volumes(args, model or optimise(load_model(args, args.task, device)))


def fuse_demo(args: TestArgs, device: torch.device) -> None:
    """Draw a phantom pair for each task, fuse it with the task's weights, and show all three."""
    models = {task: optimise(load_model(args, task, device)) for task in TASKS}
    out = writable_folder(args.out or ROOT / "result" / "demo")
    rows, pairs, outputs = [], [], {}
    for task, model in tqdm(models.items(), unit="pair", desc="phantoms"):
        paths = [out / f"{task}_{modality}.png" for modality in (TASKS[task], "MRI")]
        for path, image in zip(paths, phantom_pair(task), strict=True):
            write_png(path, image)
        pairs.append(Pair(task, *paths))
        outputs[task] = out / f"{task}_fused.png"
        for _, fused in fuse_pairs(model, pairs[-1:], 1, args.stretch):
            write_png(outputs[task], fused)
            rows.append((task, [*look_at(pairs[-1]), fused]))
    sheet = out / "contact_sheet.png"
    write_png(sheet, contact_sheet(rows, ["CT / PET / SPECT", "MRI", "fused"]))
    print(f"look at {sheet}")
    if args.metrics:
        print_metrics(outputs, pairs, "phantoms")


def print_metrics(outputs: dict[str, Path], pairs: list[Pair], title: str) -> None:
    """The table of metrics.py for the files just written."""
    from evaluation.tables import print_table  # only --metrics needs these, and they load slowly
    from metrics import compare

    # in this process: a fork after CUDA has started would hang
    print_table(compare({"ASFE-Fusion": outputs}, pairs, jobs=1, title=title))


if __name__ == "__main__":
    run_script(main, ARGS)
