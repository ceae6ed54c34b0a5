"""A case of a study that kills its worker; a worker imports this file, which loads nothing slow."""

import os
import signal
from pathlib import Path


def dies(packed: bytes) -> dict:
    """In place of `remote`: the case c00 kills its worker, c01 only the first that takes it."""
    name = next((name for name in ("c00", "c01") if name.encode() in packed), "")
    mark = Path(os.environ["ASFE_TEST_MARK"])
    if name == "c00" or (name == "c01" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": "?", "status": "done", "message": "", "again": False, "seconds": 0.0}
