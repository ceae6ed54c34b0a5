"""The house keeps its order: what stands at the root, and who imports whom."""

import ast
import re
from pathlib import Path

from args_setting import ROOT

LAYERS = (  # a file imports from layers before its own, or from its own without a circle
    {"args_setting", "cli", "limits"},
    {"network", "losses", "images"},
    {"inference", "weights", "dataset", "checkpoints", "phantom"},
    {"volumes", "evaluation", "fusing"},
    {"metrics"},
    {"train_asfe", "test_asfe", "app", "classify_asfe", "export_onnx", "hubconf", "onnx_example"}
    | {"study", "studies", "webpage"},
)
ROOMS = {"volumes", "evaluation", "studies", "webpage", "benchmarks", "docs", "tests"}
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "shared", "result", "modelsave"} & set(path.relative_to(ROOT).parts)
]


def module_name(path: Path) -> str:
    """Such as "network" or "volumes.grid"; a package by its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules of the house that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & {module_name(p) for p in FILES}


GRAPH = {module_name(path): imports_of(path) for path in FILES}


def test_every_file_at_the_root_has_its_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == LAYER_OF.keys() - ROOMS
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert rooms == ROOMS


COMMANDS = LAYERS[-1] - ROOMS


def undocumented(path: Path) -> list[str]:
    """Public functions, classes and methods of a file that have no docstring.

    A method that replaces one of another library, as `forward` and `__init__`, is described by its
    class. A command's `main(args)` is described by the file.
    """
    nodes = [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    lacking = []
    for owner, node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_") or node.name in ("forward", "main"):
            continue
        if ast.get_docstring(node) is None:
            lacking.append(f"{path.relative_to(ROOT)}: {owner}{node.name}")
        if isinstance(node, ast.ClassDef):
            nodes += [(f"{node.name}.", inner) for inner in node.body]
    return lacking


def test_every_public_name_has_a_docstring():
    rooms = ("volumes", "evaluation", "studies", "webpage")
    files = [path for path in FILES if path.parent == ROOT or path.parent.name in rooms]
    assert [line for path in files for line in undocumented(path)] == []


def test_a_file_without_docstrings_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text(
        'def f():\n    pass\n\n\nclass A:\n    """A."""\n\n    def g(self):\n        pass\n'
    )
    assert undocumented(path) == ["file.py: f", "file.py: A.g"]


FREE_OF_NOQA = ("B", "C901", "PLR", "PTH", "RET", "RUF", "SIM")  # rules without exceptions


def exceptions(text: str) -> list[str]:
    """The rules of FREE_OF_NOQA from which comments of a text make an exception."""
    listed = re.findall(r"#\s*(?:ruff:\s*)?noqa(?::\s*([A-Z0-9, ]+))?", text)
    rules = [rule.strip() for group in listed for rule in (group or "PLR").split(",")]
    return [rule for rule in rules if rule.startswith(FREE_OF_NOQA)]


def test_no_comment_makes_an_exception_from_the_rules():
    assert {str(p): e for p in FILES if (e := exceptions(p.read_text(encoding="utf-8")))} == {}
    assert "per-file-ignores" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_an_exception_from_the_rules_is_found():
    mark = "no" + "qa"
    assert exceptions(f"x = 1  # {mark}: E402, SIM118") == ["SIM118"]
    assert exceptions(f"x = 1  # {mark}") == ["PLR"]
    assert exceptions(f"import a as b  # {mark}: N813") == []


def test_the_readme_stays_a_page():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_imports_point_one_way():
    for name, imported in GRAPH.items():
        layer = LAYER_OF.get(name.split(".")[0])
        for other in imported if layer is not None else ():
            assert LAYER_OF[other.split(".")[0]] <= layer, f"{name} imports {other}"
    house = {name for name in GRAPH if name.split(".")[0] in LAYER_OF}
    users = {name: GRAPH[name] & COMMANDS for name in house}
    assert not any(users.values()), f"a command is no library: {users}"


def test_nothing_below_the_commands_sees_their_settings():
    """Of the settings of fusing: cli.py reads flags, the commands make requests of them."""
    rooms = {"volumes", "evaluation", "studies", "webpage"}
    below = set().union(*LAYERS[1:-1]) | rooms
    for path in FILES:
        name = module_name(path)
        if name.split(".")[0] in below:
            text = path.read_text(encoding="utf-8")
            found = [word for word in ("TestArgs", "VolumeArgs", "StudyArgs") if word in text]
            assert not found, f"{name} knows {found}"


def test_words_are_printed_by_commands_only():
    """What a study or the page calls says what it has to say in fields, or to a function."""
    for path in FILES:
        if module_name(path).split(".")[0] in ("fusing", "volumes", "studies", "webpage"):
            text = path.read_text(encoding="utf-8")
            called = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            names = {function.id for function in called if isinstance(function, ast.Name)}
            assert not names & {"print", "redirect_stdout", "redirect_stderr"}, module_name(path)


def test_there_is_no_circle():
    left = {name: set(imported) - {name} for name, imported in GRAPH.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"files that import each other: {sorted(left)}"
