"""Makes everything that waits for the device an error, on CUDA by torch itself, on the CPU alike."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightkit as lk


class _NoReads(TorchDispatchMode):
    """Raises where Python reads the number in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and not self.allowed:
            raise AssertionError("a tensor was read")
        return function(*args, **(kwargs or {}))


class NoWaiting(lk.Callback):
    """Forbids waiting from the start of batch ``first`` to the end of batch ``last``.

    On a GPU the first batches are left out: they load kernels and make states, which waits.

    Attributes:
        batches: How many batches ran under it.
    """

    order = 95

    def __init__(self, device: str, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.batches = 0
        self._reads: _NoReads | None = None

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx == self.first:
            self._begin()

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.batches += self._on
        if batch_idx == self.last:
            self.end()

    _on = False

    def _begin(self) -> None:
        self._on = True
        if self.device == "cuda":
            _cuda("error")
        else:
            self._reads = _NoReads()
            self._reads.__enter__()

    def end(self) -> None:
        """Allows everything again."""
        if self._on and self.device == "cuda":
            _cuda("default")
        if self._reads is not None:
            self._reads.__exit__(None, None, None)
        self._on, self._reads = False, None

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Lets its body wait, as the one read of a flush does."""
        if self._on and self.device == "cuda":
            _cuda("default")
        if self._reads is not None:
            self._reads.allowed = True
        try:
            yield
        finally:
            if self._on and self.device == "cuda":
                _cuda("error")
            if self._reads is not None:
                self._reads.allowed = False


def _cuda(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it does not see everything
        torch.cuda.set_sync_debug_mode(mode)
