"""A visitor of the page without a browser: uploads, and clicks by what gradio's page would send."""

import itertools
import json
import threading
from pathlib import Path

import httpx

COUNT = itertools.count()
PATIENCE = 600


class Visitor:
    """One session on a page."""

    def __init__(self, address: str):
        self.address, self.session = f"{address}gradio_api/", f"visitor{next(COUNT)}"
        config = httpx.get(f"{address}config", timeout=PATIENCE).json()["dependencies"]
        self.lock, self.stream = threading.Lock(), None
        self.replies: dict[str, Reply] = {}
        self.functions: dict[str, int] = {}
        for function in config:
            self.functions.setdefault(function["api_name"], function["id"])

    def upload(self, path: Path) -> dict:
        """A file on the page, as a component has it."""
        with path.open("rb") as file:
            reply = httpx.post(f"{self.address}upload", files={"files": file}, timeout=PATIENCE)
        reply.raise_for_status()
        return {
            "path": reply.json()[0],
            "orig_name": path.name,
            "meta": {"_type": "gradio.FileData"},
        }

    def click(self, name: str, *data) -> "Reply":
        """What a function of the page will answer; do not wait for it here."""
        ask = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        with self.lock:
            joined = httpx.post(f"{self.address}queue/join", json=ask, timeout=PATIENCE).json()
            reply = self.replies[joined["event_id"]] = Reply()
            if self.stream is None:
                self.stream = threading.Thread(target=self._follow, daemon=True)
                self.stream.start()
        return reply

    def _follow(self) -> None:
        """Hand each message to its reply, as long as one is open."""
        how = {"params": {"session_hash": self.session}, "timeout": PATIENCE}
        with httpx.stream("GET", f"{self.address}queue/data", **how) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                with self.lock:
                    if reply := self.replies.get(message.get("event_id")):
                        reply.take(message)
                    if all(reply.ended.is_set() for reply in self.replies.values()):
                        self.stream = None
                        return


class Reply:
    """The messages on one click, as they come."""

    def __init__(self):
        self.data, self.error, self.said = None, "", []
        self.ended = threading.Event()

    def take(self, message: dict) -> None:
        """Keep what a message says."""
        if message["msg"] == "progress":
            self.said += [unit["desc"] for unit in message["progress_data"]]
        elif message["msg"] == "log":
            self.said.append(message["log"])
        elif message["msg"] == "process_completed":
            output = message["output"]
            self.data, self.error = output.get("data"), output.get("error") or ""
            self.ended.set()

    def wait(self) -> "Reply":
        """The same when it has ended."""
        assert self.ended.wait(PATIENCE)
        return self
