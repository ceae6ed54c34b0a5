"""What a run has to say, line by line as soon as it is known."""

from collections.abc import Callable


class Report:
    """Lines for the user, without paths and without anything of the patient.

    What makes the result doubtful is kept apart, too.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        self.lines: list[str] = []
        self.doubts: list[str] = []
        self.say = say

    def tell(self, *lines: str) -> None:
        """Say lines and keep them."""
        for line in lines:
            self.lines.append(line)
            self.say(line)

    def doubt(self, *lines: str) -> None:
        """Say lines that are doubts about the result."""
        self.doubts += lines
        self.tell(*lines)
