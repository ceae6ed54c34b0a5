"""What the documents say: commands are parsed as printed, and the quick ones run; links lead on.

A block of commands below a line that names a commit is of that commit, and left alone.
"""

import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SHARED
from task_files import write_task

import args_setting
import cli
from args_setting import DATA_DIR, ROOT, SIZES, TASKS
from cli import UserError, make_parser, parse_args, run_script
from dataset import task_pairs
from images import write_png
from network import ASFEFusion
from phantom import phantom_pair
from weights import WithoutDraws

PAGES = (ROOT / "README.md", ROOT / "model_pre/README.md", *sorted((ROOT / "docs").glob("*.md")))
STARTS = re.compile(r"(?:python3?|pytest|pip|torchrun|make|git|dask|export|\.)\s")
OF_A_COMMIT = re.compile(r"\bcommit\b.*`?\b[0-9a-f]{7,40}\b")
SHELL = ("", "sh", "bash", "console")


class Command(NamedTuple):
    page: Path
    text: str  # as printed, on one line

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def script(self) -> tuple[str, list[str]] | None:
        """The file that the command runs with Python, and its arguments."""
        words = self.words
        if words[0] == "torchrun":  # whose own flags come first
            at = [i for i, word in enumerate(words) if word.endswith(".py")]
            return (words[at[0]], words[at[0] + 1 :]) if at else None
        if words[0].startswith("python") and words[1].endswith(".py"):
            return words[1], words[2:]
        return None


# --- finding them ----------------------------------------------------------------------------


def blocks_of(text: str) -> tuple[list[tuple[str, str]], str]:
    """The code blocks of a page, each with its language, "" for an indented one; and the rest."""
    found, prose, lines = [], [], text.splitlines()
    i = 0
    while i < len(lines):
        above = next((line for line in reversed(prose) if line.strip()), "")
        if fence := re.fullmatch(r"```(\w*)", lines[i]):
            end = next(j for j in range(i + 1, len(lines)) if lines[j] == "```")
            block, language, i = lines[i + 1 : end], fence[1], end + 1
        elif lines[i].startswith("    ") and not lines[i - 1].strip():
            end = next((j for j in range(i, len(lines)) if lines[j].strip() and
                        not lines[j].startswith("    ")), len(lines))  # fmt: skip
            block, language, i = lines[i:end], "", end
        else:
            prose.append(lines[i])
            i += 1
            continue
        if not OF_A_COMMIT.search(above):
            found.append((language, "\n".join(block)))
    return found, "\n".join(prose)


def commands_of(page: Path) -> list[Command]:
    """The commands of a page: of its code blocks, and those among its words.

    A line that goes on after a backslash is one line. A name that is set, as T="python …", stands
    for its value from there on. What follows a `#` is a comment.
    """
    blocks, prose = blocks_of(page.read_text(encoding="utf-8"))
    lines = []
    for language, block in blocks:
        if language in SHELL:
            lines += re.sub(r"(?:#.*)?\\\n\s*", "", block).splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found, values = [], {}
    for line in lines:
        line = re.sub(r"(?:^|\s)#.*", "", line).strip()
        for part in re.split(r'&&|;\s(?=(?:[^"]*"[^"]*")*[^"]*$)', line):  # outside of quotes
            part = part.strip()
            if named := re.fullmatch(r'(\w+)="(.*)"', part):
                values[named[1]] = named[2]
                continue
            part = re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), part)
            if STARTS.match(part):
                found.append(Command(page, part))
    return found


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
SCRIPTS = [command for command in COMMANDS if command.script()]


def named(command: Command) -> str:
    return f"{command.page.relative_to(ROOT)}: {command.text}"


def test_the_commands_are_found():
    assert len(COMMANDS) > 60
    texts = [command.text for command in COMMANDS]
    for text in ("make demo", "python test_asfe.py --demo", "pip install -r requirements.txt"):
        assert text in texts
    page = 'Words.\n\n    python a.py --x \\\n        1   # why\n    T="python b.py"; $T --y\n\n'
    page += "So `python c.py\n--z` runs.\n\nAt commit 1234abc:\n\n    python old.py\n"
    file = Path(sys.modules[__name__].__file__).with_name("no.md")
    found = commands_of_text(file, page)
    assert found == ["python a.py --x 1", "python b.py --y", "python c.py --z"]


def commands_of_text(page: Path, text: str) -> list[str]:
    class Page(type(page)):
        def read_text(self, encoding):
            return text

    return [command.text for command in commands_of(Page(page))]


# --- as printed ------------------------------------------------------------------------------


def module_of(script: str):
    """The module of a script of ours."""
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return importlib.import_module(path.stem)


def settings_of(script: str):
    """The settings class of a script at the root, and its check of them; None for another.

    The script is not imported, as some take seconds.
    """
    if "/" in script:
        return None
    text = (ROOT / script).read_text(encoding="utf-8")
    found = re.search(r"command_line\((\w+),[^\n]*?(?:, (check_\w+))?\)\n", text)
    if found is None:
        return None
    check = getattr(cli, found[2]) if found[2] else None
    return getattr(args_setting, found[1]), check


def parsed(script: str, argv: list[str]):
    """What the command's own parser makes of its flags; SystemExit or UserError if they fail."""
    if found := settings_of(script):
        cls, check = found
        args = parse_args(cls, argv)
        if check:
            check(args)
        return args
    if script == "onnx_example.py":
        assert len(argv) == 4
        return argv
    module = module_of(script)
    if hasattr(module, "parse"):
        return module.parse(argv)
    assert not argv, f"{script} takes no flags"
    return None


def importable(script: str) -> None:
    """Skip where a command needs packages that are not here."""
    needs = {
        "benchmarks/study_speed.py": "distributed",
        "benchmarks/page.py": "gradio",
        "benchmarks/registration.py": "SimpleITK",
        "benchmarks/volume_memory.py": "SimpleITK",
        "benchmarks/metric_times.py": "sewar",
        "docs/colours.py": "pydicom",
        "docs/mosaic.py": "nilearn",
        "docs/registration.py": "SimpleITK",
    }
    if script in needs:
        pytest.importorskip(needs[script])


@pytest.mark.parametrize("command", SCRIPTS, ids=named)
def test_the_flags_of_a_command_are_parsed_as_printed(command, monkeypatch, tmp_path):
    script, argv = command.script()
    importable(script)
    monkeypatch.chdir(tmp_path)  # so that no path of an example is there by chance
    if script == "benchmarks/speed.py" and "--against" in argv:
        (tmp_path.parent / "before").mkdir(exist_ok=True)
    parsed(script, argv)


def test_other_commands_name_what_is_there():
    """pip's requirement files, make's targets, pytest's files and tests."""
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.M)
    targets = phony[1].split()
    for command in COMMANDS:
        words = command.words
        where = named(command)
        for word, value in pairwise(words):
            assert word != "-r" or (ROOT / value).is_file(), where
        assert words[0] != "make" or words[1] in targets, where
        if "pytest" in words:
            files = [ROOT / word for word in words if word.endswith(".py")]
            assert files and all(file.is_file() for file in files), where
            if "-k" in words:
                word = words[words.index("-k") + 1]
                assert any(re.search(rf"def test_\w*{word}", f.read_text()) for f in files), where


def test_flags_among_the_words_exist():
    """Every --flag that a page names is one of a command of ours, or of those that pages use."""
    known = {"--nproc_per_node", "--index-url", "--nthreads", "--lifetime", "--lifetime-stagger"}
    known |= {"--mov", "--dst", "--lta"}  # of FreeSurfer
    known |= {"--nanny", "--memory-limit", "--help", "--host", "--port", "--scheduler-file"}
    for path in ROOT.glob("*.py"):
        for cls in set(re.findall(r"command_line\((\w+),", path.read_text(encoding="utf-8"))):
            parser = make_parser(getattr(args_setting, cls))
            known |= {flag for action in parser._actions for flag in action.option_strings}
    for path in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    unknown = {}
    for page in PAGES:
        blocks, prose = blocks_of(page.read_text(encoding="utf-8"))
        text = prose + "\n".join(block for _, block in blocks)
        flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", re.sub(r"\]\([^)]*\)", "", text)))
        if flags - known:
            unknown[page.name] = sorted(flags - known)
    assert not unknown


def test_links_of_the_documents_lead_to_files():
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
                titles = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
                assert anchor in titles, f"{page}: {target}"


def test_files_and_names_that_the_documents_tell_of_are_there():
    """Such as `network.py`, and `split_pairs` in `dataset.py`."""
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        text = page.read_text(encoding="utf-8")
        if page.name != "CHANGELOG.md":  # which also tells of what is gone
            for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|csv|toml))`", text):
                places = (ROOT, page.parent, ROOT / "tests", ROOT / "HMIFDatasets")
                made = name in (
                    "pairs.csv",
                    "labels.csv",
                    "report.csv",
                    "mydata/people.csv",
                )  # by a user
                assert made or any((place / name).exists() for place in places), f"{page}: {name}"
        for name, file in re.findall(r"`(\w+)` (?:in|of) `((?:\w+/)*\w+\.py)`", text):
            code = (ROOT / file).read_text(encoding="utf-8")
            found = re.search(rf"^(?:def |class )?{name}\b", code, re.M)
            assert found, f"{page}: {name} in {file}"


PYTHON = [
    (page, block)
    for page in PAGES
    for language, block in blocks_of(page.read_text(encoding="utf-8"))[0]
    if language == "python"
]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page.stem for page, _ in PYTHON])
def test_python_of_the_documents_imports_what_is_there(page, block):
    for node in ast.walk(ast.parse(block)):
        if (
            isinstance(node, ast.ImportFrom)
            and (ROOT / node.module.partition(".")[0]).with_suffix(".py").is_file()
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"


# --- in full ---------------------------------------------------------------------------------

LONG = {  # part of a command -> why it is not run here
    "train_asfe.py": "trains",
    "--download": "fetches the data set",
    "study.py": "starts processes, see test_study.py",
    "app.py": "serves until it is stopped",
    "export_onnx.py": "takes half a minute, see test_onnx.py",
    "onnx_example.py": "needs an exported file, see test_onnx.py",
    "--findings": "takes half a minute, see test_findings.py",
    "--labels": "draws 200 permutations, see test_classify.py",
    "dicom_folder/": "registers for half a minute, see test_volumes_register.py",
    "--exploratory": "measures all of SPECT-MRI, see test_classify.py",
    "--leakage": "measures all of SPECT-MRI, see test_classify.py",
    "--size paper": "needs weights that are not shipped",
    "benchmarks/ablation": "trains",
    "benchmarks/left_out": "measures weights that are not shipped, see test_benchmarks.py",
    "benchmarks/speed": "measures for minutes, see test_benchmarks.py",
    "benchmarks/startup": "measures for minutes",
    "benchmarks/study_speed": "measures for minutes",
    "benchmarks/page": "measures for minutes",
    "benchmarks/metric_times": "measures for minutes",
    "benchmarks/loss_on_pixels": "measures for minutes",
    "benchmarks/published": "reads images that are not shipped",
    "benchmarks/registration": "measures for hours",
    "benchmarks/results": "measures for minutes, see test_results.py",
    "benchmarks/volume_memory": "measures for minutes",
    "docs/": "draws the pictures of the documents anew",
    "/shared/": "of another machine",
}
QUICK = {c.text: c for c in SCRIPTS if not any(part in c.text for part in LONG)}  # each once


CASES = {  # of each task in the data folder of the examples: those that pages name, and a few
    "CT-MRI": ("2", "21"),
    "PET-MRI": ("25", "41"),
    "SPECT-MRI": ("10", "11", "15", "18", "22", "29", "3"),
}


def write_data(root: Path) -> Path:
    """A data folder: a slice of each of CASES, of the real set where it is there."""
    shared = SHARED / "HMIFDatasets"
    for task, cases in CASES.items():
        if not shared.is_dir():
            write_task(root, task, "test", {f"{case}001": 192 for case in cases})
            continue
        for case in cases:
            pair = task_pairs(shared, task, "test", cases=(case,))[0]
            for path in (pair.path1, pair.path2):
                file = root / path.relative_to(shared)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, file)
    return root


def write_images(root: Path) -> None:
    """Pairs and folders of drawn images as the examples name them, and the labels of a folder."""
    for task in TASKS:
        modality = TASKS[task].lower()
        source1, mri = phantom_pair(task, 64)
        for folder, image in ((modality, source1), ("mri", mri), ("fused", mri)):
            write_png(root / f"{folder}.png", image)
            (root / folder).mkdir(exist_ok=True)
            for k in range(12):
                write_png(root / folder / f"{k}.png", np.roll(image, k, 0))
    rows = [f"{k}.png,p{k},{('well', 'ill')[k % 2]}" for k in range(12)]
    (root / "labels.csv").write_text("\n".join(["image,person,label", *rows]))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with what the examples name: pairs of a task, folders, weights, results."""
    root = tmp_path_factory.mktemp("workspace")
    data = write_data(root / "HMIFDatasets")
    for folder in ("result", "elsewhere", "FOLDER"):
        for task in TASKS:
            (root / folder / task).mkdir(parents=True)
            for pair in task_pairs(data, task, "test"):
                shutil.copy(pair.path2, root / folder / task)
                shutil.copy(pair.path2, root / folder)
    write_images(root)
    for folder in ("modelsave", "modelsave/A", "modelsave/B"):
        (root / folder).mkdir()
        for name in ("all", *TASKS):
            shipped = ROOT / "model_pre" / "compact_all.safetensors"
            shutil.copy(shipped, root / folder / f"compact_{name}.safetensors")
    (root / "model_pre").symlink_to(ROOT / "model_pre")
    return root


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def volumes_for(command: Command, workspace: Path, request) -> None:
    """Put the volumes that a command names there, in place of images of that name."""
    pytest.importorskip("SimpleITK")
    import nibabel
    from dicom_files import write_series

    heads = request.getfixturevalue("heads")
    for word in command.words:
        kind = next((k for k in ("ct", "pet", "mri") if word.startswith(k)), "mri")
        if word in ("--img1", "--img2", "--out", "--mosaic") or word.startswith("fused"):
            continue
        if word.endswith(".nii.gz"):
            shutil.copy(heads[kind], workspace / word)
        elif word.endswith("/"):
            image = nibabel.load(heads[kind])
            shutil.rmtree(workspace / word, ignore_errors=True)
            modality = {"ct": "CT", "pet": "PT", "mri": "MR"}[kind]
            write_series(workspace / word, np.asarray(image.dataobj), image.affine, modality)


def of_data(script: str, args, folder: Path):
    """The settings with another data folder, where they have a use for one."""
    if settings_of(script) is None:
        args.data_dir = folder
        return args
    moved, (_, check) = replace(args, data_dir=folder), settings_of(script)
    try:
        if check:
            check(moved)
    except UserError:
        return args
    return moved


@pytest.mark.parametrize("command", QUICK.values(), ids=named)
def test_a_quick_command_runs_as_printed(command, in_workspace, request, monkeypatch, capsys):
    script, argv = command.script()
    importable(script)
    if ".nii" in command.text:
        volumes_for(command, in_workspace, request)
    args, module = parsed(script, argv), module_of(script)
    if hasattr(module, "ROOT"):
        monkeypatch.setattr(module, "ROOT", in_workspace)
    if getattr(args, "data_dir", None) in (DATA_DIR, Path("HMIFDatasets")):
        folder = in_workspace / "HMIFDatasets"
        if "--check" in argv:  # of the whole set
            folder = request.getfixturevalue("shared") / "HMIFDatasets"
        args = of_data(script, args, folder)
    try:
        run_script(module.main, args)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if out := getattr(args, "out", None):
        assert out.exists()


def test_python_of_the_first_page_runs(in_workspace):
    [block] = [block for page, block in PYTHON if page.name == "README.md" and "fused.png" in block]
    (in_workspace / "example.py").write_text(block)
    (in_workspace / "fused.png").unlink(missing_ok=True)
    runpy.run_path("example.py")
    assert (in_workspace / "fused.png").is_file()


def test_every_setting_is_told_of_somewhere():
    """No command has a flag without help."""
    for path in ROOT.glob("*.py"):
        for cls in set(re.findall(r"command_line\((\w+),", path.read_text(encoding="utf-8"))):
            for field in fields(getattr(args_setting, cls)):
                assert field.metadata["help"], (cls, field.name)


# --- figures that follow from the code -------------------------------------------------------


def test_the_sizes_are_as_the_first_page_says():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, words in {
        "paper": "with {:.1f} million",
        "compact": "modules with {:.2f} million",
    }.items():
        with torch.device("meta"), WithoutDraws():
            count = sum(p.numel() for p in ASFEFusion(SIZES[name]).parameters())
        assert words.format(count / 1e6) in text, name


def test_the_map_of_the_volumes_names_every_file():
    text = (ROOT / "volumes" / "__init__.py").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+\.py", ast.get_docstring(ast.parse(text)))) - {
        "test_asfe.py",
        "app.py",
    }
    files = {path.name for path in (ROOT / "volumes").glob("*.py")} - {"__init__.py"}
    assert words == files, f"volumes/__init__.py: {sorted(words ^ files)}"
