"""A folder beside an unfinished file, for what an interrupted run should not have to compute or fetch again.

It is made when the first thing is put there and goes when the file is complete. What depends on other inputs has
another name.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from . import __version__
from .errors import OutputError


class Workplace:
    """`OUTPUT.work`."""

    def __init__(self, output: str) -> None:
        self.folder = Path(output + ".work")

    def place(self, what: str, *inputs: object) -> Path:
        """Where to keep `what`, as it follows from `inputs` (told apart by `repr`) and this version."""
        digest = hashlib.sha256(repr((__version__, inputs)).encode()).hexdigest()
        return self.folder / f"{what}-{digest[:24]}"

    def make(self) -> Path:
        """The folder, once it is there; OutputError if it cannot be."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}") from error
        return self.folder

    def remove(self) -> None:
        """Everything in it, and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
