"""In place of a child process of the page: its functions run in the process of the tests."""

import json

from studies import child


class Replies:
    """Takes what a child sends; what its function tells goes on at once."""

    def __init__(self, tell):
        self.tell = tell

    def write(self, line: bytes) -> None:
        kind, content = json.loads(line)
        assert kind == "told"
        self.tell(*content)

    def flush(self) -> None:
        pass


class NearChild:
    """`studies.child.Child`, with the same errors, but neither limits nor a clock."""

    def begin(self) -> None:
        pass

    def run(self, function: str, *args, seconds: float, tell=None):
        kind, content = child._outcome(child.Call(function, args), Replies(tell), tell is not None)
        content = json.loads(json.dumps(content))
        if kind == "refused":
            raise child.UserError(content)
        if kind == "fault":
            raise child.FaultError(*content)
        return content
