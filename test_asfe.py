"""Fuse image pairs with trained weights and write them as PNG, with a contact sheet to look at.

    python test_asfe.py --demo                                three drawn phantom pairs
    python test_asfe.py --task PET-MRI                        the test split of HMIFDatasets/
    python test_asfe.py --img1 ct.png --img2 mri.png --out fused.png
    python test_asfe.py --dir1 pet/ --dir2 mri/ --out fused/  two folders, paired by file name
    python test_asfe.py --img1 ct.nii.gz --img2 dicom/ --out fused.nii.gz    volumes, see volumes.py

Source 1 is CT, PET or SPECT, source 2 is MRI; --task all takes the weights for pairs of any other
kind. Colour is fused as luma and gets its chroma back.
"""

import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from args_setting import (
    ROOT,
    TASKS,
    CommonArgs,
    TestArgs,
    VolumeArgs,
    parse_args,
    run_script,
)
from dataset import (
    EXTENSIONS,
    Pair,
    case_of,
    match_pairs,
    read_image,
    read_pair,
    task_pairs,
    to_uint8,
    writable_folder,
    write_png,
)
from network import MIN_SIDE, ASFEFusion, keep_freed_memory, load_weights, start
from phantom import phantom_pair

CELL, GAP, HEADER = 256, 6, 26  # pixels of the contact sheet
VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".ima")


def load_model(args: TestArgs, task: str, device: torch.device) -> ASFEFusion:
    """The network with the weights that the settings ask for; ValueError if they do not fit."""
    path = args.weights or ROOT / "model_pre" / f"{args.size}_{task}.safetensors"
    if args.weights is None and not path.is_file():
        raise ValueError(
            f"no weights of size {args.size} for {task}, expected {path}; train, or use --weights"
        )
    model, metadata = load_weights(path, device)
    if metadata["size"] != args.size:
        raise ValueError(f"weights {path} are of size {metadata['size']}, --size is {args.size}")
    if args.aff != "auto":
        model.aff = args.aff
    if device.type == "cpu":
        keep_freed_memory(model)
    return model


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


def check_pairs(pairs: list[Pair], outputs: list[Path]) -> None:
    """Read every pair once before anything is written, so that bad input leaves no output.

    Nor may an output take the place of a source.
    """
    sources = {path.resolve() for pair in pairs for path in (pair.path1, pair.path2)}
    for path in outputs:
        if path.resolve() in sources:
            raise ValueError(f"{path} is a source and would be overwritten, choose another --out")
    for pair in pairs:
        height, width = read_pair(pair)[0].shape
        if min(height, width) < MIN_SIDE:
            side = f"{MIN_SIDE}x{MIN_SIDE}"
            raise ValueError(f"{pair.path1} is {height}x{width}, expected at least {side}")


def contact_sheet(rows: list[tuple[str, list[np.ndarray]]], titles: list[str]) -> np.ndarray:
    """Rows of (name, images) under column titles, as one RGB image."""
    cells = [[_cell(image) for image in images] for _, images in rows]
    height = HEADER + len(rows) * (CELL + GAP)
    sheet = np.full((height, len(titles) * (CELL + GAP) + GAP, 3), 24, np.uint8)
    for column, title in enumerate(titles):
        left = GAP + column * (CELL + GAP)
        _write(sheet, title, (left + 4, HEADER - 8))
        for row, (name, _) in enumerate(rows):
            top = HEADER + row * (CELL + GAP)
            sheet[top : top + CELL, left : left + CELL] = cells[row][column]
            if column == 0:
                _write(sheet, name, (left + 4, top + CELL - 6))
    return sheet


def _cell(image: np.ndarray) -> np.ndarray:
    """The image, fitted into a square cell."""
    scale = CELL / max(image.shape[:2])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    image = cv2.resize(np.ascontiguousarray(image), size, interpolation=how)
    image = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    cell = np.zeros((CELL, CELL, 3), np.uint8)
    top, left = (CELL - image.shape[0]) // 2, (CELL - image.shape[1]) // 2
    cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cell


def _write(sheet: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(sheet, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (220, 220, 220), 1, cv2.LINE_AA)


def as_stored(path: Path) -> np.ndarray:
    """An image file as 8-bit grey or RGB."""
    return to_uint8(*read_image(path))


def fuse_folder(args: TestArgs, pairs: list[Pair], out: Path, device: torch.device) -> None:
    """Fuse pairs into the folder `out` and draw a contact sheet beside it."""
    out = out.resolve()
    sheet = out.with_name(f"{out.name or 'fused'}_contact_sheet.png")
    outputs = {pair.name: out / f"{pair.name}.png" for pair in pairs}
    check_pairs(pairs, [*outputs.values(), sheet])
    model = load_model(args, args.task, device)
    writable_folder(out)
    shown = np.linspace(0, len(pairs) - 1, min(args.contact_rows, len(pairs))).round()
    shown = {pairs[int(i)].name for i in shown}
    rows = []
    started = time.perf_counter()
    with tqdm(total=len(pairs), unit="pair", desc=f"{args.size} {args.task}") as progress:
        for pair, fused in fuse_pairs(model, pairs, args.batch_size, args.stretch):
            write_png(outputs[pair.name], fused)
            if pair.name in shown:
                rows.append((pair.name, [as_stored(pair.path1), as_stored(pair.path2), fused]))
            progress.update()
    print(f"{len(pairs)} pairs in {time.perf_counter() - started:.1f} s: {out}")
    if rows:
        titles = ["source 1", "source 2"] if args.task == "all" else [TASKS[args.task], "MRI"]
        write_png(sheet, contact_sheet(rows, [*titles, "fused"]))
        print(f"contact sheet: {sheet}")
    if args.metrics:
        print_metrics(outputs, pairs, args.task)


def fuse_one(args: TestArgs, device: torch.device) -> None:
    """Fuse --img1 and --img2 into the file --out."""
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise ValueError(f"--out is {args.out}, expected a file name that ends in .png")
    pair = Pair(args.img1.stem, args.img1, args.img2)
    check_pairs([pair], [args.out])
    model = load_model(args, args.task, device)
    writable_folder(args.out.resolve().parent)
    for _, fused in fuse_pairs(model, [pair], 1, args.stretch):
        write_png(args.out, fused)
    print(f"fused image: {args.out}")
    if args.metrics:
        print_metrics({pair.name: args.out}, [pair], args.task)


def is_volume(path: Path) -> bool:
    """Whether a path is for volumes.py: by its name, a folder (DICOM), or DICOM's mark in it."""
    if path.is_dir() or path.name.lower().endswith(VOLUMES):
        return True
    if path.suffix.lower() in EXTENSIONS or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def fuse_pair_of_volumes(args: TestArgs, device: torch.device) -> None:
    """Hand --img1 and --img2 over to volumes.py, whose packages are an extra."""
    try:
        from volumes import fuse_volumes
    except ModuleNotFoundError as error:
        raise ValueError(
            f"volumes need {error.name}: pip install -r requirements-volumes.txt"
        ) from None
    fuse_volumes(args, load_model(args, args.task, device))


def check_no_volume_flags(args: TestArgs) -> None:
    """ValueError if a setting that only volumes have was given for images."""
    common = {f.name for f in fields(CommonArgs)}
    for f in fields(VolumeArgs):
        if f.name not in common and getattr(args, f.name) != f.default:
            raise ValueError(f"--{f.name} is for volumes, but --img1 and --img2 are none")


def fuse_demo(args: TestArgs, device: torch.device) -> None:
    """Draw a phantom pair for each task, fuse it with the task's weights, and show all three."""
    models = {task: load_model(args, task, device) for task in TASKS}
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
            rows.append((task, [as_stored(path) for path in paths] + [fused]))
    sheet = out / "contact_sheet.png"
    write_png(sheet, contact_sheet(rows, ["CT / PET / SPECT", "MRI", "fused"]))
    print(f"look at {sheet}")
    if args.metrics:
        print_metrics(outputs, pairs, "phantoms")


def print_metrics(outputs: dict[str, Path], pairs: list[Pair], title: str) -> None:
    """The table of metrics.py for the files just written."""
    from metrics_report import compare, print_table  # only --metrics needs it, and it loads slowly

    # in this process: a fork after CUDA has started would hang
    print_table(compare({"ASFE-Fusion": outputs}, pairs, jobs=1, title=title))


def main(args: TestArgs) -> None:
    given = {name for name in ("img1", "img2", "dir1", "dir2") if getattr(args, name)}
    if given not in (set(), {"img1", "img2"}, {"dir1", "dir2"}):
        raise ValueError("give --img1 with --img2, or --dir1 with --dir2, or none of them")
    if given and (args.demo or not args.out):
        raise ValueError("--img1 and --dir1 need --out and go without --demo")
    device = start(args)
    if "img1" in given and any(
        [is_volume(args.img1), is_volume(args.img2), args.out.name.lower().endswith(VOLUMES)]
    ):
        return fuse_pair_of_volumes(args, device)
    check_no_volume_flags(args)
    if args.demo:
        fuse_demo(args, device)
    elif "img1" in given:
        fuse_one(args, device)
    elif "dir1" in given:
        pairs = match_pairs(args.dir1, args.dir2, args.skip_unmatched)
        fuse_folder(args, pairs, args.out, device)
    elif args.task == "all":
        raise ValueError("task all has no test split of its own: give a task, or pairs of images")
    else:
        pairs = task_pairs(args.data_dir, args.task, "test", args.skip_unmatched)
        if unknown := set(args.cases) - {case_of(pair) for pair in pairs}:
            raise ValueError(
                f"cases has {sorted(unknown)}, which the test split of {args.task} lacks"
            )
        pairs = [pair for pair in pairs if not args.cases or case_of(pair) in args.cases]
        fuse_folder(args, pairs, args.out or ROOT / "result" / args.task, device)


if __name__ == "__main__":
    run_script(main, parse_args(TestArgs, description=__doc__))
