"""The plan of a compression with a target: made, kept for the next run, or one that was saved.

`planning` measures and decides; here is what it decides about and when that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .allocation import Plan, Target, undivided
from .checkpoint import Checkpoint
from .container.plan import check_plan
from .errors import RecipeError
from .filing import plan_of_file
from .guide import Guide
from .inventory import dtype_of, lay_out
from .planning import Candidate, fitted, measure
from .recipe import make_recipe
from .workplace import Workplace

Progress = Callable[[int, int], None]
ZSTD_MARGIN = 0.005  # of a file's size: what is measured on samples of tensors may be off by so much
SENSITIVITY_WINDOWS = 4  # of calibration text, on which every tensor's divergence is measured


def chosen_plan(
    checkpoint: Checkpoint, guide: Guide, target: Target, progress: Progress | None, work: Workplace | None = None,
    overrides: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """A plan for the target, which an earlier run may have left in `work`.

    What `overrides` say of tensors is fixed, and counts.
    """
    if target.saved is not None:
        return Plan.load(target.saved)
    if guide.statistics is None or guide.windows is None:
        raise RecipeError("a target needs calibration text", hint="give some with --calibration")
    candidates, fixed_bits, parameters = survey(checkpoint, overrides)
    wanted = target.bits_per_weight, target.file_bytes, target.zstd, target.alike, tuple(overrides)
    kept = (
        work.place("plan", checkpoint.fingerprint(), guide.digest(), guide.method, wanted, SENSITIVITY_WINDOWS)
        if work
        else None
    )
    made = None
    if kept is not None and kept.exists():
        try:
            made = Plan.load(kept)
        except RecipeError:  # half of it: a machine that went down
            kept.unlink()
    if made is None:
        units = measure(
            checkpoint, candidates, method=guide.method, statistics=guide.statistics,
            windows=guide.windows[:SENSITIVITY_WINDOWS], zstd=target.zstd, progress=progress,
            folder=work.folder if work else None,
        )  # fmt: skip
        if target.alike:
            units = [undivided(unit) for unit in units]
        if target.bits_per_weight is not None:
            made = fitted(units, fixed_bits, parameters, int(target.bits_per_weight * parameters))
        else:
            made = _of_size(
                checkpoint, guide, target, overrides, lambda bits: fitted(units, fixed_bits, parameters, bits)
            )
        if work is not None and kept is not None:
            work.make()
            made.save(kept)
    if target.save is not None:
        made.save(target.save)
    return made


def _of_size(
    checkpoint: Checkpoint, guide: Guide, target: Target, overrides: Sequence[str], fit: Callable[[int], Plan]
) -> Plan:
    """The plan of the most bits whose file, with all that is beside weights in it, has the size asked for at most."""
    assert target.file_bytes is not None
    size = int(target.file_bytes * (1 - ZSTD_MARGIN)) if target.zstd else target.file_bytes
    beside = 0
    while True:  # what is beside weights depends a little on their encodings: how records fill their places
        made = fit(8 * (size - beside))
        recipe = made.recipe(target.name, overrides)
        _, job = lay_out(checkpoint, recipe)
        whole = plan_of_file(checkpoint, job, recipe, guide.method, target.zstd, guide)
        needed = check_plan(whole, str(checkpoint.folder)) - job.weight_bytes()
        if needed <= beside:
            return made
        beside = needed


def survey(checkpoint: Checkpoint, overrides: Sequence[str] = ()) -> tuple[list[Candidate], int, int]:
    """What a plan decides on, the bits of all else (`overrides` included), and the number of all parameters."""
    recipe = make_recipe("mixed", overrides)
    weights, job = lay_out(checkpoint, recipe)
    items = [(item.name, item, 1) for item in job.residents]
    items += [(f"{path}.{i.name}", i, job.counts[path]) for path, group in job.experts.items() for i in group]
    candidates, fixed, parameters = list[Candidate](), 0, 0
    for name, item, count in items:
        parameters += math.prod(item.shape) * count
        if item.encoding.mode == "affine" and not item.packed and recipe.override(name) is None:
            shape = (count, *item.shape) if item.role == "expert" else item.shape
            candidates.append(Candidate(name, item.role, dtype_of(weights[item.weight]), shape))
        else:
            fixed += 8 * count * sum(item.encoding.part_sizes(item.shape))
    return candidates, fixed, parameters
