"""The `squizd` command: parse, call, map known errors to one line and an exit code.

Exit codes: 0 done; 1 a known error, or an invalid file; 2 wrong usage, or (validate) unreadable; 130 interrupted.
Every command imports what it needs when it is called.
"""

from __future__ import annotations

import atexit
import gc
import os

import click

from .. import __version__
from .compressing import compress
from .files import inspect, repack, validate
from .measuring import bench, evaluate, fit, profile
from .running import run
from .shared import Group

# Calibration and gptq use NumPy's BLAS on many small matrices, where its threads, which spin while they wait for each
# other, made a busy machine ten to twenty times slower. To be set before NumPy is imported, which commands do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before it ends, the interpreter searches everything that was imported for cycles, three times: a quarter of a second
# after mlx-lm. What is frozen it does not search; the system takes the memory back either way.
atexit.register(gc.freeze)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="squizd")
def main() -> None:
    """Run Mixture-of-Experts models that do not fit in memory, without changing their answers."""


for _command in (bench, compress, evaluate, fit, inspect, profile, repack, run, validate):
    main.add_command(_command)
