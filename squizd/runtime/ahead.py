"""What a model will need first, announced to the system before there is a model. No MLX: it is not imported yet.

Importing MLX, building the tokenizer and tokenizing the prompt take a second or more, in which a disk would rest; how
many slots there will be is not known until then. So the system is told what will be read, in file order: what is always
in use, and the experts that a profile says are used most. `warm` brings those into slots later. No answer depends on
it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .. import container
from ..container.layout import Record
from ..container.reader import File
from ..errors import SquizdError
from .budget import parse_share, parse_size
from .profile import read_profile
from .source import open_source

Size = str | int | None
Share = str | float | None


@contextmanager
def announced(path: str | os.PathLike[str], memory: Size, resident: Share) -> Iterator[None]:
    """While inside, the system is told what loading `path` with these arguments will need, by a thread of its own.

    What is wrong with the file or an argument is left to whoever loads.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_announce, args=(path, memory, resident, stop), name="squizd-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _announce(path: str | os.PathLike[str], memory: Size, resident: Share, stop: threading.Event) -> None:
    try:
        with container.open(path) as file:
            source = open_source(file)
            for record in first_needed(file, memory, resident):
                if stop.is_set():
                    break
                source.announce(record.offset, record.stored_size)  # waits while the disk's queue is full
            source.close()
    except (SquizdError, OSError):
        return


def first_needed(file: File, memory: Size, resident: Share) -> list[Record]:
    """In file order: resident tensors, and of each layer's experts those that a profile says are used most.

    As many of these as `resident` says, or as `memory` could hold beside the resident tensors; without a profile all
    or none. Raises RequestError for arguments that say nothing, FormatError for a profile that is none.
    """
    found = [record for _, record in file.residents.values()]
    layers = [[file.expert(x.layer, e) for e in range(x.expert_count)] for x in file.moe_layers]
    share = 1.0
    if resident is not None:
        share = parse_share(resident)
    elif memory is not None and layers:
        room = parse_size(memory) - sum(record.raw_size for record in found)
        share = min(1.0, max(0.0, room / sum(record.raw_size for layer in layers for record in layer)))
    profile = read_profile(file)
    for index, layer in enumerate(layers):
        if share == 1:
            found += layer
        elif profile is not None:
            found += [layer[e] for e in profile.layers[index].busiest(int(share * len(layer)))]
    return sorted(found, key=lambda record: record.offset)
