"""What is known of a model's inputs: statistics by tensor, in memory and as a file.

Importance, GPTQ and plans are made of them; how they are found is the business of `calibration`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from .errors import OutputError, SourceError

Floats = npt.NDArray[np.float32]
_ARRAYS = ("moments", "tokens", "mass", "squares", "products")


@dataclass
class Statistics:
    """Means by parameter path without ".weight", and what they come from.

    moments: mean square input by channel, [in], or [experts, in] where weighted by gate² and mixed with the layer's.
    tokens, mass, squares: by expert module, [experts]: how often each was chosen, the sums of its gates and of their
        squares.
    feedback: by expert projection, the share of the output error that GPTQ is expected to leave.
    products: mean of x xᵀ, [in, in], of inputs of layers in constant use, by path of the first that has these inputs.
    shared: that path by path of the others that have the same inputs.
    """

    source: dict[str, Any]
    moments: dict[str, Floats] = field(default_factory=dict)
    tokens: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    mass: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    squares: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    feedback: dict[str, float] = field(default_factory=dict)
    products: dict[str, Floats] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def hessian(self, path: str) -> Floats | None:
        """Mean of x xᵀ of a layer in constant use, if it is known."""
        return self.products.get(self.shared.get(path, path))

    def digest(self) -> str:
        """SHA-256 over everything."""
        found = hashlib.sha256(json.dumps(self.source, sort_keys=True).encode())
        for kind in _ARRAYS:
            for path, array in sorted(getattr(self, kind).items()):
                found.update(path.encode() + b"\0" + array.tobytes())
        found.update(json.dumps([self.feedback, self.shared], sort_keys=True).encode())
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as .npz; OutputError if that fails."""
        facts = json.dumps({"source": self.source, "feedback": self.feedback, "shared": self.shared})
        arrays: dict[str, Any] = {"facts": np.frombuffer(facts.encode(), np.uint8)}
        for kind in _ARRAYS:
            arrays |= {f"{kind} {name}": array for name, array in getattr(self, kind).items()}
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as f:
                np.savez(f, **arrays)
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote; SourceError if it is anything else."""
        try:
            with open(path, "rb") as f, np.load(f) as z:  # a file that NumPy opens stays open if it is no archive
                facts = json.loads(z["facts"].tobytes())
                found = cls(facts["source"], feedback=facts["feedback"], shared=facts["shared"])
                for name in z.files:
                    kind, _, key = name.partition(" ")
                    if key:
                        getattr(found, kind)[key] = z[name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
            raise SourceError(
                f"{path} holds no calibration statistics: {error}",
                hint="--statistics writes them if the file is not there",
            ) from error
        if found.squares.keys() != found.tokens.keys():
            raise SourceError(f"{path} holds an earlier version's statistics", hint="delete it, and they are made anew")
        return found
