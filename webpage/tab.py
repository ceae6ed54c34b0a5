"""What both tabs of the page do alike: wait for a turn, ask a child process, word an error.

Gradio comes as an argument, since other parts of the house are also there without it.
"""

import html
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cli import UserError
from studies.child import Child, FaultError
from webpage.turns import Turns

# Messages about earlier files close when others are chosen, or at the next click.
CLOSE_MESSAGES = "() => document.querySelectorAll('.toast-close').forEach(b => b.click())"
OURS = "this is a fault of the program, not of your files; its log says more"


def sentence(error: Exception, *files: str) -> str:
    """An error's message with the names of uploads in place of their paths, safe as HTML."""
    text = str(error)
    for file in files:
        text = text.replace(file, Path(file).name)
    return html.escape(text, quote=False)


class Place(NamedTuple):
    """Where the files of visitors lie, and how long."""

    folder: Path  # of uploads and results; swept
    minutes: float  # the age at which files are removed
    log: Callable[[str], None]  # gets the traceback of a fault of ours


class Tab:
    """A tab of the page. It holds settings and children, never an image or a volume."""

    def __init__(self, gr, place: Place):
        self.gr, self.place = gr, place

    def error(self, error: Exception, *files: str | None) -> Exception:
        """The error as a sentence on the page; it stays until it is closed."""
        text = sentence(error, *filter(None, files))
        return self.gr.Error(text, duration=None, print_exception=False)

    def warn(self, error: Exception, *files: str | None) -> None:
        """Show the error as a sentence, where the handler goes on; it stays until it is closed."""
        self.gr.Warning(sentence(error, *filter(None, files)), duration=None)

    def uploads(self, *files: str | None, need: str) -> tuple[Path, ...]:
        """The paths of uploads; UserError, `need`, if one is absent, or if it was swept away."""
        if not all(files):
            raise UserError(need)
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"{file} is gone, as {self.kept()}; choose it again")
        return tuple(map(Path, files))

    def kept(self) -> str:
        """How long files are kept, for messages."""
        return f"files are kept for {self.place.minutes:g} minutes"

    def new(self, name: str = "") -> Path:
        """A path for a new file, or without a name a new folder, that is removed when it is old."""
        return Path(tempfile.mkdtemp(dir=self.place.folder), name)

    def ask(self, child: Child, function: str, *args: Any, **how: Any) -> Any:
        """`Child.run`; a fault of ours goes to the log and becomes a UserError."""
        try:
            return child.run(function, *args, **how)
        except FaultError as fault:
            self.place.log(fault.trace)
            raise UserError(OURS) from None

    def queued(
        self, turns: Turns, function: Callable, only: str = "", progress: bool = False
    ) -> Callable:
        """`function` as a handler for gradio, which waits for its turn and says its position.

        Args:
            only: the name of a kind of job, of which a visitor may have one in the queue.
            progress: `function` gets gradio's progress first.
        """
        gr, shown = self.gr, self.gr.Progress()

        def handler(request: gr.Request, shown=shown, *values):
            files = list(paths_in(values, str(self.place.folder)))

            def tell(before: int) -> None:
                # gradio's page shows the text only beside a share of the work
                shown(0, desc=f"in the queue, {before} before you" if before else "working")

            try:
                with turns.turn(str(request.session_hash), files, only, tell):
                    return function(*([shown] if progress else []), *values)
            except UserError as error:
                raise self.error(error, *files) from None

        handler.__name__ = getattr(function, "__name__", "handler")
        return handler


def paths_in(values: Iterable[Any], folder: str) -> Iterator[str]:
    """The paths below a folder among values, also in lists and tuples of them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from paths_in(value, folder)
        elif isinstance(value, (str, Path)) and str(value).startswith(folder):
            yield str(value)
