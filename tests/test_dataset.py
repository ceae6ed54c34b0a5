"""Image pairs, the training set, splits by patient, and the download of the data set."""

import hashlib
import http.server
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from task_files import write_task

import dataset
from args_setting import TASKS, DataArgs, TrainArgs
from dataset import (
    Pair,
    TrainPairs,
    augment,
    case_of,
    match_pairs,
    people,
    read_pair,
    split_lines,
    split_pairs,
    task_pairs,
    validation_people,
)
from images import write_png
from phantom import phantom_pair


def write_folder(folder: Path, names: list[str], side: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), np.zeros((side, side), np.uint8))
    return folder


# --- pairs -----------------------------------------------------------------------------------


def test_pairs_go_by_name_not_by_place(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["b.png", "c.tif", "d.png"])
    dir2 = write_folder(tmp_path / "2", ["c.png", "a.png", "b.bmp"])
    (dir1 / "notes.txt").write_text("no image")
    pairs = match_pairs(dir1, dir2, skip_unmatched=True)
    assert pairs == [
        Pair("b", dir1 / "b.png", dir2 / "b.bmp"),
        Pair("c", dir1 / "c.tif", dir2 / "c.png"),
    ]
    with pytest.raises(ValueError, match=r"a \(and 1 others\) is in .*2 but not in .*1"):
        match_pairs(dir1, dir2)


def test_wrong_folders_are_named(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["a.png", "a.bmp"])
    empty = write_folder(tmp_path / "2", [])
    other = write_folder(tmp_path / "3", ["z.png"])
    for folders, message in [
        ((dir1, other), "both a.bmp and a.png"),
        ((other, empty), "no images"),
        ((other, tmp_path / "4"), "no such folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            match_pairs(*folders)
    with pytest.raises(ValueError, match=r"dataset\.py --download"):
        task_pairs(tmp_path, "CT-MRI", "test")
    with pytest.raises(ValueError, match="no file name occurs in both"):
        match_pairs(other, write_folder(tmp_path / "5", ["y.png"]), skip_unmatched=True)


def test_two_sizes_in_a_pair_are_named(tmp_path):
    dir1 = write_folder(tmp_path / "1", ["a.png"], 32)
    dir2 = write_folder(tmp_path / "2", ["a.png"], 48)
    with pytest.raises(ValueError, match=r"32x32.*48x48"):
        read_pair(match_pairs(dir1, dir2)[0])


def test_the_real_data(shared):
    counts = {(t, s): len(task_pairs(shared / "HMIFDatasets", t, s)) for t in TASKS
              for s in ("train", "test")}  # fmt: skip
    assert counts == {
        ("CT-MRI", "train"): 160,
        ("CT-MRI", "test"): 24,
        ("PET-MRI", "train"): 245,
        ("PET-MRI", "test"): 24,
        ("SPECT-MRI", "train"): 333,
        ("SPECT-MRI", "test"): 24,
    }
    for task, is_colour in (("CT-MRI", False), ("PET-MRI", True), ("SPECT-MRI", True)):
        luma1, luma2, chroma = read_pair(task_pairs(shared / "HMIFDatasets", task, "test")[0])
        assert luma1.shape == luma2.shape == (256, 256)
        assert (chroma is not None) == is_colour


# --- training --------------------------------------------------------------------------------


def test_augmentation_treats_both_images_alike():
    image = torch.arange(64 * 64, dtype=torch.int32).view(64, 64)
    seen = set()
    for _ in range(200):
        one, two = augment(torch.stack([image, image + 5000]), 32)
        assert one.shape == (32, 32) and torch.equal(one + 5000, two)
        step = (int(one[0, 1] - one[0, 0]), int(one[1, 0] - one[0, 0]))
        seen.add(step)
    # all eight symmetries of the square
    assert seen == {(a, b * 64) for a in (1, -1) for b in (1, -1)} | {
        (a * 64, b) for a in (1, -1) for b in (1, -1)
    }


def test_crops_lie_in_the_head():
    """A head in a corner of much black: a crop anywhere would mostly miss it."""
    image = torch.zeros(2, 256, 256, dtype=torch.uint8)
    image[0, 10:40, 200:240] = 200
    assert all(augment(image, 32).any() for _ in range(50))
    assert augment(torch.zeros(2, 64, 64, dtype=torch.uint8), 32).shape == (2, 32, 32)


def test_training_pairs(tmp_path):
    for name in ("a", "b"):
        for folder, image in zip("12", phantom_pair("PET-MRI", 64), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_png(tmp_path / folder / f"{name}.png", image)
    pairs = TrainPairs(match_pairs(tmp_path / "1", tmp_path / "2"), 48)
    images, name = pairs[1]
    assert len(pairs) == 2 and name == "b"
    assert images.shape == (2, 48, 48) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    pairs.patch = 32
    assert pairs[1][0].shape == (2, 32, 32)
    with pytest.raises(ValueError, match="is 64x64, expected 65x65 or more"):
        TrainPairs(match_pairs(tmp_path / "1", tmp_path / "2"), 65)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three patients of four slices each."""
    names = {f"{case}{slice_:03d}": 64 for case in (1, 2, 3) for slice_ in range(4)}
    return write_task(tmp_path_factory.mktemp("data"), "CT-MRI", "train", names)


def cases_in(pairs: list[Pair]) -> set[tuple[str, str]]:
    """Task and case of pairs of a data folder."""
    return {(pair.path1.parts[-4], case_of(pair)) for pair in pairs}


def numbers_in(pairs: list[Pair]) -> set[str]:
    return {case_of(pair) for pair in pairs}


def test_validation_shares_no_person_with_training(data):
    train, val, left_out, _ = split_pairs(TrainArgs(data_dir=data, val=0.1, leave_out=("3",)))
    assert numbers_in(train) == {"2"} and numbers_in(val) == {"1"} and numbers_in(left_out) == {"3"}
    train, val, left_out, _ = split_pairs(TrainArgs(data_dir=data, val_cases=("2", "3")))
    assert numbers_in(train) == {"1"} and len(val) == 8 and not left_out
    (data / "people.csv").write_text("task,case,person\nCT-MRI,1,a\nCT-MRI,3,a\n")
    split = split_pairs(TrainArgs(data_dir=data, val_cases=("3",)))
    assert numbers_in(split.train) == {"2"} and numbers_in(split.val) == {"1", "3"}
    assert split_lines(split) == ["held out for validation: 8 pairs of 1 person, cases 1 = 3"]
    with pytest.raises(ValueError, match="val_cases and leave_out both name the person of 1 = 3"):
        split_pairs(TrainArgs(data_dir=data, val_cases=("3",), leave_out=("1",)))
    (data / "people.csv").unlink()
    split = split_pairs(TrainArgs(data_dir=data, val=0))
    assert len(split.train) == 12 and not split.who
    assert split_lines(split) == ["nobody is held out for validation"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("task,case\nCT-MRI,1\n", "columns task, case and person"),
        ("task,case,person\nCT,1,a\n", "task 'CT'.*expected a task of CT-MRI, PET-MRI"),
        ("task,case,person\nCT-MRI,1\n", "person ''.*neither of the others empty"),
        ("task,case,person\nCT-MRI,,a\n", "case ''.*neither of the others empty"),
    ],
)
def test_a_wrong_table_of_people_is_named(data, table, message):
    (data / "people.csv").write_text(table)
    try:
        with pytest.raises(ValueError, match=message):
            split_pairs(TrainArgs(data_dir=data))
    finally:
        (data / "people.csv").unlink()


@pytest.mark.parametrize(
    ("sizes", "share", "held"),
    [
        ([{"a": 4, "b": 4, "c": 4}], 0, ""),
        ([{"a": 4, "b": 4, "c": 4}], 0.1, "a"),
        ([{"a": 4, "b": 4, "c": 4}], 0.4, "ab"),
        ([{"a": 9}], 0.1, ""),  # one person trains
        ([{"a": 1, "b": 9}, {"b": 1, "c": 9}], 0.1, "ac"),  # b is in both, and trains both
        ([{"a": 9, "b": 1}, {"b": 1, "c": 9}], 0.1, "ac"),
        ([{"b": 1, "c": 9}, {"b": 5}], 0.1, "c"),  # or the second task had nobody
        ([{"a": 1, "b": 9}, {"a": 1, "b": 9}], 0.1, "a"),
        ([{}, {"a": 1, "b": 9}], 0.1, "a"),  # a task of which everybody was left out
    ],
)
def test_validation_leaves_every_task_somebody_to_train_on(sizes, share, held):
    sizes = {str(i): Counter(counts) for i, counts in enumerate(sizes)}
    assert validation_people(sizes, share) == set(held)


@pytest.mark.parametrize(
    "sizes",
    [
        [{"a": 1, "b": 9}],
        [{"a": 5, "b": 5}, {"b": 5, "c": 5}, {"a": 5, "c": 5}],
        [{"a": 5, "b": 5}, {"a": 5}, {"b": 5}],
    ],
)
def test_a_share_that_nobody_can_give_is_refused(sizes):
    sizes = {f"task {i}": Counter(counts) for i, counts in enumerate(sizes)}
    with pytest.raises(ValueError, match=r"task .: val is 0\.3, which its 2 people .*--val_cases"):
        validation_people(sizes, 0.3)


def test_validation_of_many_people_holds_whole_ones_of_each_task():
    """Over random people in three tasks, some of them in several: never a task without training."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = {}
        for task in TASKS:
            names = rng.choice(12, rng.integers(1, 9), replace=False).tolist()
            sizes[task] = Counter({str(name): int(rng.integers(1, 40)) for name in names})
        try:
            held = validation_people(sizes, 0.2)
        except ValueError:
            continue
        for counts in sizes.values():
            assert counts.keys() - held
            assert len(counts) == 1 or sum(counts[p] for p in held) >= 0.2 * counts.total()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """CT-MRI, PET-MRI and SPECT-MRI: two cases 41, one person in two tasks, PET of one person."""
    root = tmp_path_factory.mktemp("tasks")
    cases = {"CT-MRI": (7, 21, 41), "PET-MRI": (25, 41), "SPECT-MRI": (21, 25, 30)}
    for task, numbers in cases.items():
        write_task(root, task, "train", {f"{case}{i:03d}": 64 for case in numbers for i in (0, 1)})
    people = ["PET-MRI,25,P", "PET-MRI,41,P", "CT-MRI,21,B", "SPECT-MRI,21,B"]
    (root / "people.csv").write_text("\n".join(["task,case,person", *people]))
    return root


def split_of(root: Path, **settings) -> dataset.Split:
    return split_pairs(TrainArgs(data_dir=root, task="all", **settings))


@pytest.mark.parametrize("name", ["leave_out", "val_cases"])
def test_a_number_that_is_another_person_elsewhere_needs_its_task(tasks, name):
    with pytest.raises(ValueError, match=f"{name} has '41'.* expected CT:41 or PET:41"):
        split_of(tasks, **{name: ("41",)})
    for text in ("CT:41", "ct:41", "CT-MRI:41"):
        split = split_of(tasks, val=0, **{name: (text,)})
        assert cases_in(split.left_out + split.val) == {("CT-MRI", "41")}
    # one person whatever the task: both numbers of PET, both tasks of 21
    split = split_of(tasks, val=0, **{name: ("PET:41", "21")})
    expected = {("PET-MRI", "25"), ("PET-MRI", "41"), ("CT-MRI", "21"), ("SPECT-MRI", "21")}
    assert cases_in(split.left_out + split.val) == expected
    for wrong in ("PET:7", "MR:41", "8", "PET:", ":41"):
        with pytest.raises(ValueError, match=f"has '{wrong}', expected some of CT:7, CT:21 = SPEC"):
            split_of(tasks, **{name: (wrong,)})


def test_what_a_setting_removes_is_told(tasks):
    split = split_of(tasks, leave_out=("PET:41",), val_cases=("CT:41", "30"))
    assert split_lines(split) == [
        "left out: 4 pairs of 1 person, cases PET:25 = PET:41",
        "held out for validation: 4 pairs of 2 people, cases CT:41, SPECT:30",
        "PET-MRI: nobody is left to train on",
    ]
    split = split_of(tasks, val=0.1)
    assert split_lines(split)[1] == (
        "PET-MRI: nobody is held out for validation as it shows one person"
    )
    assert "SPECT-MRI: nobody is held out for validation" in split_lines(
        split_of(tasks, val_cases=("7",))
    )
    everyone = ("CT:7", "CT:41", "21", "PET:25", "SPECT:25")
    with pytest.raises(ValueError, match=r"no pairs to train on: left out: 14 pairs.*SPECT:30"):
        split_of(tasks, leave_out=everyone, val_cases=("SPECT:30",))


def test_people_of_the_data_set_are_not_its_cases(shared):
    root = shared / "HMIFDatasets"
    listed = people(root)
    cases = {
        (task, case_of(pair))
        for task in TASKS
        for split in ("train", "test")
        for pair in task_pairs(root, task, split)
    }
    assert cases == listed.keys() and len(cases) == 28 and len(set(listed.values())) == 24
    assert len({who for (task, _), who in listed.items() if task == "PET-MRI"}) == 1
    split = split_pairs(TrainArgs(data_dir=root, task="PET-MRI"))
    assert len(split.train) == 245 and not split.val
    # who is in two tasks is held back in both
    split = split_of(root, val_cases=("21",))
    assert cases_in(split.val) == {("CT-MRI", "21"), ("SPECT-MRI", "21")}
    assert "21" not in numbers_in(split.train)


def test_batches_do_not_depend_on_the_number_of_processes(data):
    pairs = TrainPairs(task_pairs(data, "CT-MRI", "train"), 32, seed=5)
    whole = pairs.batches(4)
    assert sorted(i for batch in whole for i in batch) == list(range(12))
    shards = [pairs.batches(4, rank, 2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shards, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    assert len(pairs.batches(5)) == 2, "what is left over waits for the next epoch"
    pairs.epoch = 1
    assert pairs.batches(4) != whole
    first = pairs[3]
    torch.rand(1)  # the state of the generator does not matter
    assert torch.equal(first[0], pairs[3][0]) and first[1] == pairs[3][1]
    pairs.epoch = 2
    assert not torch.equal(first[0], pairs[3][0])


# --- the HMIF data set -----------------------------------------------------------------------


def test_the_hash_list_is_that_of_the_data(shared):
    sums = dataset.hmif_sums()
    assert len(sums) == 2 * (160 + 24 + 245 + 24 + 333 + 24)
    for name in list(sums)[::97]:
        data = (shared / "HMIFDatasets" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sums[name]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small set on a local server: its address, its files and the list of requests."""
    root = tmp_path / "served"
    files = {}
    for task in TASKS:
        for folder, image in zip((TASKS[task], "MRI"), phantom_pair(task, 32), strict=True):
            name = f"{task}/test/{folder}/16009.png"
            (root / name).parent.mkdir(parents=True)
            write_png(root / name, image)
            files[name] = (root / name).read_bytes()
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    monkeypatch.setattr(dataset, "HMIF_SUMS", tmp_path / "SHA256SUMS")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root, files, requests
    server.shutdown()


def test_download_fetches_and_verifies(served, tmp_path):
    url, _, files, requests = served
    target = tmp_path / "target"
    assert dataset.download(target, url) == len(files)
    assert {str(p.relative_to(target)) for p in target.rglob("*.*")} == set(files)
    assert all((target / name).read_bytes() == data for name, data in files.items())
    # a second call asks for nothing, a damaged file is fetched again
    requests.clear()
    assert dataset.download(target, url) == 0 and requests == []
    damaged = next(iter(files))
    (target / damaged).write_bytes(b"half")
    assert dataset.check(target)[1] == [f"{damaged}: damaged, its hash differs"]
    assert dataset.download(target, url) == 1 and requests == [f"/{damaged}"]
    assert dataset.check(target)[1] == []


def test_download_refuses_other_bytes(served, tmp_path):
    url, root, files, _ = served
    wrong = list(files)[2]
    (root / wrong).write_bytes(b"something else")
    target = tmp_path / "target"
    with pytest.raises(ValueError, match=f"{wrong}: not the bytes"):
        dataset.download(target, url)
    assert not (target / wrong).exists()
    assert not list(target.rglob("*.part"))
    # once the server is right, the rest follows
    (root / wrong).write_bytes(files[wrong])
    dataset.download(target, url)
    assert dataset.check(target)[1] == []


def test_download_without_a_server(served, tmp_path):
    with pytest.raises(ValueError, match="run the command again"):
        dataset.download(tmp_path / "target", "http://127.0.0.1:9")


def test_check_names_what_is_wrong(served, tmp_path, capsys):
    url, _, files, _ = served
    target = tmp_path / "target"
    dataset.download(target, url)
    missing = next(iter(files))
    (target / missing).unlink()
    stray = target / "PET-MRI/test/MRI/41101.jpg"
    stray.write_bytes(b"")
    (target / "PET-MRI/test/41101.jpg").write_bytes(b"")  # as in the published collection
    found, wrong = dataset.check(target)
    assert "PET-MRI/test/41101.jpg: not part of the set, never read" in found
    assert "CT-MRI/test/CT: 0 of 1" in found and "CT-MRI/test/MRI: 1 of 1" in found
    assert wrong == [f"{missing}: missing", "PET-MRI/test/MRI/41101.jpg: not part of the set"]
    with pytest.raises(ValueError, match="2 things wrong"):
        dataset.main(DataArgs(data_dir=target))
    stray.unlink()
    dataset.download(target, url)
    dataset.main(DataArgs(data_dir=target))
    assert "all files present and verified" in capsys.readouterr().out
    dataset.main(DataArgs(data_dir=target, check=False))
    assert capsys.readouterr().out == ""
