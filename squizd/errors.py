"""Every error that squizd raises on purpose.

::

    SquizdError                  one line for the user, `hint` says what to do next
    ├── FormatError              a file breaks a rule of the spec: `code`, `offset`
    ├── ReadError                bytes that should be there cannot be had
    │   └── ExpertReadError      the same for one expert: `layer`, `expert`, `offset`
    ├── SourceError              a checkpoint, or the model in a file, is incomplete, broken or unknown
    ├── RecipeError              the asked quantization is impossible or contradicts itself
    ├── OutputError              the result cannot be written: full disk, read-only folder
    ├── BudgetError              the memory budget is too small: `minimum` in bytes
    ├── ContextError             prompt and answer do not fit the reserved context
    ├── TextError                calibration or evaluation text is empty, binary or too short
    ├── RequestError             an argument makes no sense (an unknown expert, an empty prompt)
    └── BackendError             MLX cannot be used on this machine as installed

Anything else that escapes the public functions is a defect of squizd.
"""

from __future__ import annotations


class SquizdError(Exception):
    """Base of all errors; `str(error)` is one line, `hint` one more or empty."""

    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint


class FormatError(SquizdError):
    """A `.squizd` file breaks the rule `code` (spec, "Error codes") at byte `offset`."""

    hint = "the file is damaged or not a .squizd file; `squizd validate` lists every fault"

    def __init__(self, path: str, code: str, offset: int, message: str) -> None:
        super().__init__(f"{path}: {message} [{code} at byte {offset}]")
        self.path, self.code, self.offset = path, code, offset


class ReadError(SquizdError):
    """The operating system did not give the bytes that were asked for."""


class ExpertReadError(ReadError):
    """The record of one expert is unreadable, short, or does not match its digest."""

    hint = "the file changed or is damaged; run `squizd validate --deep` on it, then fetch it again"

    def __init__(self, path: str, layer: int, expert: int, offset: int, what: str) -> None:
        super().__init__(f"{path}: layer {layer} expert {expert} at byte {offset}: {what}")
        self.path, self.layer, self.expert, self.offset = path, layer, expert, offset


class SourceError(SquizdError):
    """A checkpoint, or the model in a file, cannot be used: incomplete, damaged, or of an unknown architecture."""


class RecipeError(SquizdError):
    """The quantization asked for does not exist or does not fit the tensor it is asked for."""


class OutputError(SquizdError):
    """The output file cannot be written; the final name was not touched."""


class BudgetError(SquizdError):
    """The memory budget cannot hold the model; `minimum` is what would, in bytes."""

    def __init__(self, message: str, *, minimum: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.minimum = minimum


class ContextError(SquizdError):
    """Prompt plus answer exceed the context that the budget reserved."""


class TextError(SquizdError):
    """Text to calibrate or evaluate with is absent, empty, binary, malformed or too short."""


class RequestError(SquizdError):
    """An argument is outside what the file or the function offers."""


class BackendError(SquizdError):
    """MLX, or its backend for this platform, is not installed."""

    hint = 'install one: pip install "squizd[cpu]" (Linux), "squizd[cuda]" (NVIDIA); macOS needs none'
