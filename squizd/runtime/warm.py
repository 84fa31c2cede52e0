"""A warm start: the experts that a profile says are used most, read in file order while the prompt is tokenized.

Reads go only into empty slots of layers that have not been called yet, so nothing in flight can see them,
and nothing that the model asked for is given up for a guess. Whether it happens changes no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..errors import ReadError
from .pager import READERS, Pager
from .switch import PagedSwitch

_BATCH = 2 * READERS  # experts; a call that comes meanwhile waits for so many


class Warmer:
    """Fills the slots of paged layers from a thread of its own. `pager.reclaim`, lending and closing end it."""

    def __init__(self, pager: Pager, layers: Sequence[tuple[PagedSwitch, Sequence[int]]]) -> None:
        """`layers` in file order, each with its experts in file order, no more than it has slots."""
        self._layers, self._stop = tuple(layers), threading.Event()
        self._thread = threading.Thread(target=self._run, name="squizd-warm", daemon=True)
        pager.warmer = self
        self._thread.start()

    def stop(self) -> None:
        """Read nothing more; returns when no read is under way."""
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Until all is read that will be."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for switch, experts in self._layers:
                for start in range(0, len(experts), _BATCH):
                    with switch.untouched() as slots:
                        if slots is None or self._stop.is_set():
                            break
                        slots.fill(experts[start : start + _BATCH])
                if self._stop.is_set():
                    return
        except ReadError:  # the model will ask for that expert itself, or never need it
            return
        except RuntimeError:  # the interpreter ends, and its pools take no more work
            return
        finally:
            self._layers = ()  # or the model would outlive its last user
