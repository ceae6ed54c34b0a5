"""The house keeps its order: what stands at the root, how long it is, who imports whom."""

import ast
from pathlib import Path

import pytest

from args_setting import ROOT

LAYERS = (  # a file imports from layers before its own, or from its own without a circle
    {"args_setting", "cli", "limits"},
    {"network", "losses", "images"},
    {"inference", "weights", "dataset", "checkpoints", "phantom"},
    {"volumes", "evaluation"},
    {"metrics"},
    {"train_asfe", "test_asfe", "app", "classify_asfe", "export_onnx", "hubconf", "onnx_example"}
    | {"study", "studies"},
)
ROOMS = {"volumes", "evaluation", "studies", "benchmarks", "docs", "tests"}
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
    assert {path.parent.name for path in FILES if path.parent != ROOT} == ROOMS


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short_enough_to_read(path):
    longest = 460 if path.name == "args_setting.py" else 420  # a table of settings
    assert len(path.read_text(encoding="utf-8").splitlines()) <= longest


def test_network_and_readme_keep_to_their_size():
    assert len((ROOT / "network.py").read_text().splitlines()) <= 400
    assert len((ROOT / "README.md").read_bytes()) <= 9000
    rooms = [path for path in FILES if path.parent.name == "benchmarks"]
    assert sum(len(path.read_text().splitlines()) for path in rooms) <= 1500


def test_imports_point_one_way():
    for name, imported in GRAPH.items():
        layer = LAYER_OF.get(name.split(".")[0])
        for other in imported if layer is not None else ():
            assert LAYER_OF[other.split(".")[0]] <= layer, f"{name} imports {other}"
    commands = LAYERS[-1] - ROOMS
    house = {name for name in GRAPH if name.split(".")[0] in LAYER_OF}
    users = {name: GRAPH[name] & commands for name in house}
    users["studies.run"] -= {"test_asfe"}  # a study is test_asfe.py, run on many pairs
    assert not any(users.values()), f"a command is no library: {users}"


def test_there_is_no_circle():
    left = {name: set(imported) - {name} for name, imported in GRAPH.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"files that import each other: {sorted(left)}"
