"""What a run may write, checked in one place; and the fusion of pairs of images.

Two sections: first the plan of outputs, which images and volumes share, then `fuse_images`.
volumes/ has `fuse_volumes`. A request says what one job needs, a result what became of it. Nothing
here prints.

Every source is decoded once. Bad input should leave no output. So pairs are decoded before the
first image is written, until their pixels fill AHEAD bytes. The other pairs of a large folder are
checked by their headers at that time, and decoded later, one by one. If one of them turns out to be
damaged, the run ends with a line that names it, and what was written stays.

Legend: B pairs that go through the network together, H W pixels; images as in images.py.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from args_setting import VERSION
from cli import UserError, installed, stem_of
from dataset import Pair, check_equal_sizes
from images import (
    Doubts,
    Pixels,
    coloured,
    decode,
    header_size,
    luma_and_chroma,
    part_of,
    png_bytes,
    to_uint8,
    writable_folder,
    write_together,
)
from network import MIN_SIDE, ASFEFusion
from tiles import Passes, fitting, fuse_tiled

AHEAD = 2**28  # bytes of pixels that are decoded before the first image is written
WAYS_OF_IMAGES = ("auto", "off", "check", "rigid", "similarity")  # of --register
COMPANIONS = {  # of a registered pair: what they are, and how their names go on after the stem
    "moved source 2": "_img2.png",
    "transform": ".tfm",
    "overlay": "_registration.png",
    "sidecar": ".json",
}


# --- what a run may write --------------------------------------------------------------------


class Output(NamedTuple):
    """A file that a run may write, or a folder in which it may write many."""

    what: str  # as commands and records call it
    path: Path
    flag: str = "--out"  # what names it, for messages
    names: str | None = None  # of a folder: the names of its files, as a regular expression
    replaces: bool = False  # may replace any file of its name, also one that no run of ours listed


@dataclass(frozen=True)
class Plan:
    """All outputs of a request, its sources, and where an earlier run has listed its own outputs.

    The first output is the result. `sidecar` is a JSON file of its folder and stem; its key `files`
    lists what was written together, see `listed_as`.
    """

    outputs: tuple[Output, ...]
    sources: tuple[Path, ...]
    sidecar: Path
    clear: tuple[Path, ...] = ()  # folders in which no output may lie

    def path(self, what: str) -> Path | None:
        """Where an output goes; None if the request does not have it."""
        return next((output.path for output in self.outputs if output.what == what), None)

    def without(self, *what: str) -> "Plan":
        """The plan without some outputs, which turned out to have no content."""
        kept = tuple(output for output in self.outputs if output.what not in what)
        return replace(self, outputs=kept)

    def check_clear(self) -> None:
        """UserError for an output among the sources, where it would pass for one."""
        for output in self.outputs if self.clear else ():
            for folder in sorted({os.path.realpath(folder) for folder in self.clear}):
                if Path(os.path.realpath(output.path)).is_relative_to(folder):
                    raise UserError(
                        f"{output.flag} is {output.path.parent}, inside of the source folder "
                        f"{folder}, choose another"
                    )

    def check_in_the_way(self) -> None:
        """UserError for a file or folder at an output's place that is not an earlier run's."""
        for output in self.outputs:
            path = output.path
            if output.names is None and path.is_dir():
                raise UserError(f"{path} is a folder, choose another {output.flag}")
            if output.names is not None and path.exists() and not path.is_dir():
                raise UserError(f"{path} is no folder, choose another {output.flag}")
        earlier = self.earlier()
        for output in (output for output in self.outputs if not output.replaces):
            for path in present(output):
                if listed_as(path, self.sidecar) not in earlier:
                    raise UserError(
                        f"{path} is there, and no earlier run into {self.outputs[0].path} has "
                        f"written it: remove it, or choose another {output.flag}"
                    )

    def earlier(self) -> set[str]:
        """The files that earlier runs into the same result have listed.

        A run that was killed while it renamed its files has left its sidecar under a temporary
        name. That list counts, too.
        """
        result = self.outputs[0].path
        lists = [listed(path, result) for path in (self.sidecar, part_of(self.sidecar))]
        return set().union(*(names for names in lists if listed_as(result, self.sidecar) in names))

    def stale(self, written: Iterable[Path]) -> list[Path]:
        """Existing files that an earlier run listed and this run does not write.

        They would look like files of this run, so they are to be removed. A source is never among
        them. Files outside of the sidecar's folder are found only in folders that this run names.
        """
        kept = {os.path.realpath(path) for path in (*written, *self.sources)}
        earlier = self.earlier()
        places = [self.sidecar.parent / name for name in sorted(earlier)]
        places = [path for path in places if listed_as(path, self.sidecar) in earlier]
        for output in self.outputs:
            places += [p for p in present(output) if listed_as(p, self.sidecar) in earlier]
        found = {os.path.realpath(path): path for path in places if path.is_file()}
        return [path for place, path in found.items() if place not in kept]

    def make_folders(self) -> None:
        """Make the folders of all outputs; OSError if one cannot be written to."""
        folders = {Path(os.path.realpath(output.path)).parent for output in self.outputs}
        for folder in sorted(folders | {o.path for o in self.outputs if o.names is not None}):
            writable_folder(folder)


def check_plans(plans: Sequence[Plan]) -> None:
    """UserError, in one line, if an output of a run may not be written. Call it before any is.

    An output may not meet a source of any of the plans, another output, or what is there and is not
    an earlier run's. What an earlier run wrote under the same name is replaced.
    """
    outputs = [output for plan in plans for output in plan.outputs]
    sources = SourceFiles(path for plan in plans for path in plan.sources)
    for output in outputs:
        sources.refuse(output)
    check_meeting(outputs)
    for plan in plans:
        plan.check_clear()
        plan.check_in_the_way()


SOFTWARE = "ASFE-Fusion"  # marks a sidecar as one of ours
OUTSIDE = "elsewhere:"  # in a list of files: the path is not told, only its hash


def listed_as(path: Path, sidecar: Path) -> str:
    """How a sidecar lists a file: by its path from the sidecar's folder.

    A path outside of that folder may contain a patient's name. So its hash is listed instead.
    """
    whole, folder = Path(os.path.realpath(path)), os.path.realpath(sidecar.parent)
    if whole.is_relative_to(folder):
        return whole.relative_to(folder).as_posix()
    return OUTSIDE + sha256(os.fsencode(whole)).hexdigest()


def listed(sidecar: Path, result: Path) -> set[str]:
    """The files that a sidecar of ours lists; empty if there is none.

    Old sidecars have no list. For them it is `result` and what a run of that time wrote beside it.
    """
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(content, dict) or content.get("software") != SOFTWARE:
        return set()
    files = content.get("files")
    if isinstance(files, list):
        return {str(name) for name in files}
    stem = stem_of(result)
    colour = f"{stem}_colour{result.name[len(stem) :]}"
    ends = (".json", ".tfm", "_registration.png", "_mosaic.png")
    return {result.name, colour, *(stem + end for end in ends)}


def present(output: Output) -> list[Path]:
    """The files that are there at an output's place, as far as it could have written them."""
    if output.names is None:
        return [output.path] if os.path.lexists(output.path) else []
    if not output.path.is_dir():
        return []
    return sorted(p for p in output.path.iterdir() if re.fullmatch(output.names, p.name))


def check_meeting(outputs: Sequence[Output]) -> None:
    """UserError if two outputs of one run would be one file, or one a file in another's folder."""
    seen: dict[Path, Output] = {}
    for output in outputs:
        place = Path(os.path.realpath(output.path))
        other = seen.setdefault(place, output)
        if other is not output:
            raise UserError(
                f"{output.path} would be written twice, as {other.what} and as {output.what}: "
                f"choose another {output.flag}"
            )
    for folder in (output for output in outputs if output.names is not None):
        inside = Path(os.path.realpath(folder.path))
        for place, output in seen.items():
            if place.parent == inside and re.fullmatch(folder.names, place.name):
                raise UserError(
                    f"{output.path} has a name that {folder.flag} may need: choose another "
                    f"{output.flag}"
                )


class SourceFiles:
    """The files that a run reads, and which outputs would hit one of them."""

    def __init__(self, paths: Iterable[Path]):
        paths = [Path(path) for path in paths]
        self.places = {os.path.realpath(path) for path in paths}
        self.identities = {identity(path) for path in paths} - {None}
        self.folders = {os.path.realpath(path) for path in paths if path.is_dir()}
        self.sidecars = {side: path for path in paths for side in sidecars_of(path)}

    def refuse(self, output: Output) -> None:
        """UserError if an output is a source, lies inside of one, or is the sidecar of one."""
        path, place = output.path, os.path.realpath(output.path)
        path.exists()  # OSError if the name is too long
        if place in self.places or identity(path) in self.identities:
            raise UserError(
                f"{path} is a source and would be overwritten, choose another {output.flag}"
            )
        if any(str(folder) in self.folders for folder in Path(place).parents):
            raise UserError(f"{path} is inside of a source, choose another {output.flag}")
        if place in self.sidecars:
            source = self.sidecars[place]
            raise UserError(f"{path} is the sidecar of {source}, choose another {output.flag}")


def identity(path: Path) -> tuple[int, int] | None:
    """What two spellings or hard links of one file have in common; None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def sidecars_of(source: Path) -> list[str]:
    """The JSON files that could describe a source: of its folder and stem, as BIDS has them.

    They need not exist: a new one of ours would seem to describe the source. For a link it is one
    beside the link and one beside its target. A folder has none.
    """
    if source.is_dir():
        return []
    files = source.absolute(), source.resolve()
    return [os.path.realpath(file.with_name(f"{stem_of(file)}.json")) for file in files]


# What --force can name.
FORCED = ("modality", "space", "place", "overlap", "registration", "units", "patient")


def forced_by(text: str) -> frozenset[str]:
    """What `--force` names, with commas between; UserError if it names anything else.

    "all" is all but two patients, who must be named.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in (*FORCED, "all")]:
        raise UserError(f"--force names {wrong[0]!r}, expected all, or of {', '.join(FORCED)}")
    return frozenset({*FORCED} - {"patient"} | {*names} - {"all"} if "all" in names else names)


# --- pairs of images -------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRequest:
    """One pair of images to fuse.

    Both have the same size, unless source 2 is registered.
    """

    pair: Pair  # the sources, and how they are read
    out: Path  # the fused image, PNG
    task: str = "all"  # which modalities to expect; only for the doubts about the sources
    register: str = "off"  # off, check, rigid, similarity, or file
    transform: Path | None = None  # for "file": of ITK, in pixels
    forced: frozenset[str] = frozenset()  # what is fused although it is in doubt
    stretch: bool = False  # to black and white after the network, as in the published code
    of_folders: bool = False  # one of many: the result may not lie in the folders of the sources

    @property
    def registers(self) -> bool:
        """Whether source 2 is moved, or measured."""
        return self.register != "off"

    @property
    def keeps_transform(self) -> bool:
        """Whether the given transform is the file that would be written; then it stays as it is."""
        place = self.out.with_name(self.out.stem + COMPANIONS["transform"])
        given = self.transform and os.path.realpath(self.transform)
        return given == os.path.realpath(place)

    @property
    def sources(self) -> tuple[Path, ...]:
        """All files that are named to be read."""
        named = self.pair.path1, self.pair.path2, self.transform
        return tuple(path for path in named if path)

    def plan(self) -> Plan:
        """Every file that the request may write; UserError if `out` is no name for a PNG."""
        if self.out.suffix.lower() != ".png" or self.out.is_dir():
            raise UserError(f"--out is {self.out}, expected a file name that ends in .png")
        outputs = [Output("fused image", self.out, replaces=True)]
        stem = self.out.stem
        if self.registers and self.register != "check":
            files = {what: self.out.with_name(stem + end) for what, end in COMPANIONS.items()}
            if self.keeps_transform:
                del files["transform"]
            outputs += [Output(what, path) for what, path in files.items()]
        folders = (self.pair.path1.parent, self.pair.path2.parent) if self.of_folders else ()
        return Plan(tuple(outputs), self.sources, self.out.with_name(f"{stem}.json"), folders)


def image_request_from(pair: Pair, words: Mapping[str, Any]) -> ImageRequest:
    """The request for a pair that words on a command line ask for, by the names of the flags.

    Raises UserError for words that make no request.
    """
    way, transform = str(words["register"]), None
    if way == "auto":
        way = "off"
    elif way not in WAYS_OF_IMAGES:
        if not Path(way).is_file():
            ways = ", ".join(WAYS_OF_IMAGES)
            raise UserError(f"--register is {way}, expected {ways}, or a transform's file")
        way, transform = "file", Path(way)
    return ImageRequest(
        pair,
        words["out"],
        task=words["task"],
        register=way,
        transform=transform,
        forced=forced_by(words["force"]),
        stretch=words["stretch"],
    )


@dataclass(frozen=True)
class Shift:
    """What the registration of two images found."""

    moved_pixels: float  # of source 1: the mean distance, over the image, that source 2 moves
    applied: bool  # False: it was only measured
    doubts: tuple[str, ...]  # why it cannot be trusted, if it cannot


@dataclass(frozen=True)
class FusedImage:
    """A fused pair, what was done to it, and the files that were written."""

    request: ImageRequest
    image: np.ndarray  # uint8, (H, W) or RGB (H, W, 3)
    sources: tuple[Pixels, Pixels]  # as they were fused: source 2 where it was moved to
    files: dict[str, Path]  # by what they are
    read: tuple[Path, ...]  # files that were opened
    shift: Shift | None  # None: the pair was not registered
    odd: dict[str, list[str]]  # what is odd about the sources: lines by their kind, see Doubts
    notes: tuple[str, ...] = ()  # lines on what was done in another way, for lack of memory


@dataclass(frozen=True)
class _Decoded:
    """A pair that waits for the network."""

    request: ImageRequest
    sources: tuple[Pixels, Pixels]
    odd: dict[str, list[str]]
    shift: Shift | None = None
    extras: dict[str, bytes] = field(default_factory=dict)  # files of a registration

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of source 1."""
        return self.sources[0].values.shape[:2]

    @property
    def group(self) -> tuple:
        """What pairs that go through the network together have in common."""
        return self.shape, self.request.stretch


def fuse_images(
    requests: Sequence[ImageRequest],
    model: ASFEFusion,
    batch_size: int = 4,
    also: Sequence[Output] = (),
) -> Iterator[FusedImage]:
    """Fuse pairs of images, write each fused image, and yield each result in the given order.

    Outputs and sources are checked before this function returns; the head of this file says how
    far. The images are fused while the caller iterates.

    Args:
        model: a network, as of `weights.load_weights`.
        batch_size: pairs of equal size that go through the network together.
        also: what the caller will write beside the images, such as a contact sheet.

    Raises:
        UserError: an output that may not be written, a source that cannot be read, two sources of
            different sizes or under 16 pixels, a registration that cannot be trusted, or a pair
            that needs more memory than is free, also in tiles.
        OSError: a file that cannot be read or written.
    """
    plans = [request.plan() for request in requests]
    if plans:
        first = plans[0]
        plans[0] = replace(first, outputs=(*first.outputs, *also))
    check_plans(plans)
    ahead = _decode_ahead(requests)
    shapes = [_check_headers(request) for request in requests[len(ahead) :]]
    shapes += [pair.shape for pair in ahead]
    for shape in dict.fromkeys(shapes):
        fitting(model, shape, Passes())
    for folder in sorted({request.out.parent for request in requests}):
        writable_folder(Path(os.path.realpath(folder)))
    waiting = (ahead.pop(0) if ahead else _decoded(request) for request in requests)
    return _fused(waiting, model, batch_size)


def _decode_ahead(requests: Sequence[ImageRequest]) -> list[_Decoded]:
    """The first pairs, until their pixels have AHEAD bytes."""
    decoded, size = [], 0
    for request in requests:
        if size >= AHEAD:
            break
        decoded.append(_decoded(request))
        size += sum(pixels.values.nbytes for pixels in decoded[-1].sources)
    return decoded


def _check_headers(request: ImageRequest) -> tuple[int, int]:
    """The size of source 1; UserError if the headers of a pair show that it cannot be fused."""
    pair = request.pair
    size1, size2 = map(header_size, (pair.path1, pair.path2), pair.readings)
    if not request.registers:
        _check_sizes(pair, size1, size2)
    return size1


def _check_sizes(pair: Pair, size1: tuple[int, int], size2: tuple[int, int]) -> None:
    """UserError if the two sizes, height and width, differ or are too small for the network."""
    check_equal_sizes(pair, size1, size2)
    if min(size1) < MIN_SIDE:
        height, width = size1
        side = f"{MIN_SIDE}x{MIN_SIDE}"
        raise UserError(f"{pair.path1} is {height}x{width}, expected at least {side}")


def _decoded(request: ImageRequest) -> _Decoded:
    """The pixels of a request's sources, registered if it asks for that."""
    pair, odd = request.pair, Doubts(request.task)
    paths = pair.path1, pair.path2
    sources = tuple(map(decode, paths, pair.readings))
    for i, pixels in enumerate(sources):
        odd.add(paths[i], pixels, i + 1, pair.readings[i])
    ready = _Decoded(request, sources, odd.lines)
    if request.registers:
        ready = _registered(ready)
    _check_sizes(pair, *(pixels.values.shape[:2] for pixels in ready.sources))
    return ready


def _registered(pair: _Decoded) -> _Decoded:
    """The pair with source 2 moved onto source 1, or only measured."""
    with installed("--register needs"):
        from volumes.flat import register_image
    request, (source1, source2) = pair.request, pair.sources
    luma1, _ = luma_and_chroma(source1)
    luma2, chroma2 = luma_and_chroma(source2)
    registered = register_image(
        luma1, luma2, chroma2, request.register, request.transform, request.forced
    )
    applied = registered.text is not None
    shift = Shift(registered.moved_pixels, applied, tuple(registered.doubts))
    if not applied:
        return _Decoded(request, pair.sources, pair.odd, shift)
    moved = stored(registered.luma, registered.chroma, source2.values.dtype)
    extras = {
        "moved source 2": png_bytes(moved.values),
        "transform": registered.text,
        "overlay": png_bytes(registered.picture),
    }
    return _Decoded(request, (source1, moved), pair.odd, shift, extras)


def stored(luma: np.ndarray, chroma: np.ndarray | None, dtype: np.dtype) -> Pixels:
    """An image in [0, 1] as its file holds it: with as many bits as the source had."""
    most = int(np.iinfo(dtype).max)
    image = luma if chroma is None else coloured(luma, chroma)
    return Pixels(np.clip(np.rint(image * most), 0, most).astype(dtype), 0, most)


def _fused(pairs: Iterable[_Decoded], model: ASFEFusion, batch_size: int) -> Iterator[FusedImage]:
    """Fuse pairs as they come; those of equal size, one after the other, share a batch.

    A batch is smaller, or goes in tiles, where memory asks for that.
    """
    batch: list[_Decoded] = []
    passes = Passes()
    for pair in pairs:
        if batch and batch[0].group != pair.group:
            yield from _fused_batch(batch, model, passes)
            batch = []
        if not batch:
            passes = fitting(model, pair.shape, Passes(batch_size))
        batch.append(pair)
        if len(batch) == passes.batch:  # before the next pair is decoded
            yield from _fused_batch(batch, model, passes)
            batch = []
    if batch:
        yield from _fused_batch(batch, model, passes)


def _fused_batch(batch: list[_Decoded], model: ASFEFusion, passes: Passes) -> Iterator[FusedImage]:
    """Fuse pairs of one size and write each."""
    parts = [[luma_and_chroma(pixels) for pixels in pair.sources] for pair in batch]
    luma1, luma2 = (np.stack([part[i][0] for part in parts])[:, None] for i in (0, 1))
    stretch = batch[0].request.stretch
    if passes.tile:
        fused = fuse_tiled(model, luma1, luma2, passes.tile, passes.overlap)  # (B, 1, H, W)
        fused = stretched(fused) if stretch else fused
    else:
        fused = model.fuse(luma1, luma2, stretch).cpu().numpy()
    for pair, part, luma in zip(batch, parts, fused[:, 0], strict=True):
        (_, chroma1), (_, chroma2) = part
        image = to_uint8(luma, chroma2 if chroma1 is None else chroma1)
        yield _written(pair, image, sha256_of_weights(model), passes.line)


def stretched(luma: np.ndarray) -> np.ndarray:
    """Each of (B, 1, H, W) from its darkest pixel, 0, to its brightest, 1."""
    low, high = (edge(luma, axis=(1, 2, 3), keepdims=True) for edge in (np.min, np.max))
    return (luma - low) / np.maximum(high - low, np.finfo(luma.dtype).tiny)


def sha256_of_weights(model: ASFEFusion) -> str | None:
    """SHA-256 of the file that a network was loaded from; None if it was not."""
    return getattr(model, "weights_sha256", None)


def _written(pair: _Decoded, image: np.ndarray, weights: str | None, line: str) -> FusedImage:
    """The result of a pair, after its files were written, all or none.

    Args:
        weights: the SHA-256 of the network's file.
        line: what was done in another way for lack of memory; empty for nothing.
    """
    notes = (line,) if line else ()
    request, plan = pair.request, pair.request.plan()
    files = {output.what: output.path for output in plan.outputs}
    contents = {"fused image": png_bytes(image)} | pair.extras
    if "sidecar" in files:
        kept = [request.transform] if request.keeps_transform else []
        names = [listed_as(path, plan.sidecar) for path in (*files.values(), *kept)]
        contents["sidecar"] = _sidecar(pair, names, weights, notes)
    writers = {files[w]: partial(_write, data) for w, data in contents.items() if w in files}
    write_together(writers, plan.stale(files.values()))
    found = request.sources, pair.shift, pair.odd
    return FusedImage(request, image, pair.sources, files, *found, notes)


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _sidecar(
    pair: _Decoded, files: list[str], weights: str | None, notes: tuple[str, ...]
) -> bytes:
    """What was done to a registered pair, as JSON; no paths but those of `files`."""
    content = {
        "software": SOFTWARE,
        "version": VERSION,
        "weights_sha256": weights,
        "task": pair.request.task,
        "registration": {"how": pair.request.register, **asdict(pair.shift)},
        "notes": notes,
        "files": files,
    }
    return (json.dumps(content, indent=1) + "\n").encode()
