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
        self.functions: dict[str, int] = {}
        for function in config:
            self.functions.setdefault(function["api_name"], function["id"])

    def upload(self, path: Path) -> dict:
        """A file on the page, as a component has it."""
        with path.open("rb") as file:
            reply = httpx.post(f"{self.address}upload", files={"files": file}, timeout=PATIENCE)
        reply.raise_for_status()
        return {"path": reply.json()[0], "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def click(self, name: str, *data) -> "Reply":
        """What a function of the page answers; it goes on in a thread."""
        ask = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        return Reply(self.address, ask)


class Reply:
    """The messages on one click, as they come."""

    def __init__(self, address: str, ask: dict):
        self.address, self.ask = address, ask | {"session_hash": f"{ask['session_hash']}"}
        self.data, self.error, self.said = None, "", []
        self.joined = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            joined = client.post(f"{self.address}queue/join", json=self.ask).json()
            self.joined.set()
            event, params = joined["event_id"], {"session_hash": self.ask["session_hash"]}
            with client.stream("GET", f"{self.address}queue/data", params=params) as lines:
                for line in lines.iter_lines():
                    if line.startswith("data:") and self._take(json.loads(line[5:]), event):
                        return

    def _take(self, message: dict, event: str) -> bool:
        """Keep what a message says; whether it is the last one on this click."""
        if message.get("event_id") != event:
            return False
        if message["msg"] == "progress":
            self.said += [unit["desc"] for unit in message["progress_data"]]
        elif message["msg"] == "log":
            self.said.append(message["log"])
        elif message["msg"] == "process_completed":
            output = message["output"]
            self.data, self.error = output.get("data"), output.get("error") or ""
            return True
        return False

    def wait(self) -> "Reply":
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self
