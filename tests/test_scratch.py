"""Arrays on disk: what comes back, and a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from squizd import scratch as module
from squizd.errors import OutputError
from squizd.scratch import Scratch
from squizd.single import separate


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_was_put_there_comes_back_bit_for_bit(
    on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "on_cuda", lambda: on_gpu)
    random = np.random.default_rng(0)
    batches = [random.standard_normal((n, 5, 8)).astype(np.float32) for n in (3, 1, 4)]
    scratch = Scratch(tmp_path / "made")
    for batch in batches:
        scratch.append(mx.array(batch))
    batches[1] = random.standard_normal((1, 5, 8)).astype(np.float32)
    scratch[1] = mx.array(batches[1]).swapaxes(0, 1).swapaxes(0, 1)
    for found, batch in zip(scratch, batches, strict=True):
        assert np.array_equal(np.array(found), batch)
    flat = np.concatenate([b.reshape(-1, 8) for b in batches])
    for rows in ([0], [39, 0, 7, 8, 9, 8], [], list(range(40))):
        assert np.array_equal(np.array(scratch.rows(np.array(rows, np.intp))), flat[rows])
    with pytest.raises(ValueError):
        scratch[0] = mx.zeros((1, 5, 8))
    assert list(tmp_path.rglob("*")) == ([] if on_gpu else [tmp_path / "made"])  # a file without a name


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    scratch = Scratch(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        scratch.append(mx.zeros((2, 4)))
    assert "same command again" in caught.value.hint


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_one_at_a_time_give_what_all_at_once_give(kind: type, bias: bool) -> None:
    block = Block(kind(32, 64, 6, bias=bias))
    if bias:
        for name, value in list(block.experts.items()):
            if "bias" in value:
                block.experts[name]["bias"] = mx.random.normal(value["bias"].shape)
    x = mx.random.normal((2, 9, 32))
    indices = mx.random.randint(0, 5, (2, 9, 3)).astype(mx.uint32)  # the last expert is never chosen
    expected = block.experts(x, indices)
    separate(block)
    found = block.experts(x, indices)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-5)
