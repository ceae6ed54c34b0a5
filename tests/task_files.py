"""Data folders of drawn phantoms for the tests, and what lies in a folder."""

from pathlib import Path

from args_setting import TASKS
from images import write_png
from phantom import phantom_pair


def write_task(root: Path, task: str, split: str, sides: dict[str, int]) -> Path:
    """A data folder of phantoms: `sides` gives the image side for each name."""
    for name, side in sides.items():
        for folder, image in zip((TASKS[task], "MRI"), phantom_pair(task, side), strict=True):
            path = root / task / split / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, image)
    return root


def files(folder: Path) -> set[str]:
    """Everything below a folder; an empty folder counts, too."""
    return {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or not any(p.iterdir())
    }
