"""What all commands share: errors as one line and an exit code, sizes in words, progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..errors import SquizdError


class Group(click.Group):
    """Runs a command; turns errors into one line and a hint. (A broken pipe is click's to end quietly.)"""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would add an empty line, which only a terminal's ^C needs
            if sys.stderr.isatty():
                click.echo(err=True)
            raise click.exceptions.Abort from error

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            kwargs["standalone_mode"] = False
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.Abort:
            fail("interrupted", "", 130)
        except click.ClickException as error:
            if isinstance(error, click.UsageError):
                error.show()
                sys.exit(error.exit_code)
            fail(error.format_message(), "", error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", "", 130)
        except Exception as error:
            if os.environ.get("SQUIZD_DEBUG") == "1":
                raise
            if isinstance(error, SquizdError):
                fail(str(error), error.hint, 1)
            if isinstance(error, OSError | MemoryError):
                fail(str(error) or "out of memory", "", 1)
            fail(f"internal error: {type(error).__name__}: {error}", "SQUIZD_DEBUG=1 shows where; please report it", 1)


def fail(message: str, hint: str, code: int) -> NoReturn:
    """One line, perhaps a hint, and the exit code."""
    click.echo(f"squizd: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(code)


def size(count: float) -> str:
    """Bytes in words, as 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def need_mlx() -> None:
    """BackendError, with what to install, unless MLX is there."""
    from ..backend import require

    require()


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere: `progress(done, total)`."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=unit == "B", disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
