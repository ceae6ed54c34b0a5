"""Keep what libraries have to say about DICOM off the screen and out of logs.

Warnings of pydicom and highdicom quote a header's values, among them names of patients. What
matters of them is told by our own lines.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("pydicom", "highdicom")


@contextmanager
def quiet() -> Iterator[None]:
    """Drop all warnings and the libraries' log records, in a `with` or as a decorator."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(SILENT)
        logger.propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


SILENT = logging.NullHandler()
