"""A case of a study that kills its worker; a worker imports this file, which loads nothing slow."""

import os
import signal
import time
from pathlib import Path

DONE = {"name": "?", "status": "done", "message": "", "again": False, "seconds": 0.0}


def dies(packed: bytes) -> dict:
    """In place of `remote`: the case c00 kills its worker, c01 only the first that takes it.

    The environment says by which signal; MEMORY takes memory until the worker is ended for it.
    """
    name = next((name for name in ("c00", "c01") if name.encode() in packed), "")
    mark, how = Path(os.environ["ASFE_TEST_MARK"]), os.environ.get("ASFE_TEST_DEATH", "SIGKILL")
    if name == "c00" or (name == "c01" and not mark.exists()):
        mark.touch()
        if how == "MEMORY":
            held = bytearray(os.urandom(2**20) * 600)
            time.sleep(60)
            del held
        if how == "EXIT":
            os._exit(7)
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(60)  # until it is there
    return DONE
