"""One new token on a GPU with at most one short wait a layer, and the host's work beside the GPU's.

A PagedSwitch must know the router's choice before its experts may be computed. Waiting for it at once leaves the GPU
without work while the host builds the next layer's graph, and the other way round. So during one token the wait is
put off until the *next* layer has been built: the switch returns its result unevaluated, computed from slots that are
written into a mailbox later. When the next router is reached, the choice before it is received, what is missing is
read, the mailbox is written, and only then the experts of that layer and all up to the next router are scheduled.

With an `exchange` nobody waits at all: the GPU asks for the slots itself, and only the end of a token is awaited.

Nothing may be evaluated in between by the model's own code, so the first token is computed both ways, and only if
logits and caches agree bit for bit are others deferred. Digests of what was read are awaited once a token, before
its logits are returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..backend import current_stream
from ..errors import ExpertReadError

if TYPE_CHECKING:
    from .exchange import Exchange
    from .pager import Pager
    from .switch import PagedSwitch


class Deferral:
    """The deferred token of one model. `reason` says why there is none, "" while unknown or in use.

    `exchange`, if set, is used; `exchange_reason` says why it is no more.
    """

    def __init__(self, pager: Pager) -> None:
        self.reason = self.exchange_reason = ""
        self.exchange: Exchange | None = None
        self.lock = threading.RLock()  # held for a whole token; taken before any layer's
        self.tried = False
        self._pager = pager
        self._running: tuple[int, mx.Stream] | None = None
        self._pending: tuple[PagedSwitch, list[mx.array]] | None = None
        self._last: tuple[mx.array, tuple[int, mx.Stream]] | None = None

    @property
    def running(self) -> bool:
        """Whether this thread is inside a deferred token. Only asked with `lock` held, or to no harm."""
        return self._running is not None and self._running[0] == threading.get_ident()

    def fits(self, inputs: mx.array, cache: Any) -> bool:
        """One token, and caches that a first token can be taken back from."""
        if self.reason or inputs.shape != (1, 1) or not isinstance(cache, list) or self.running:
            return False
        return bool(can_trim_prompt_cache(cache))

    def settled(self) -> None:
        """Wait until no deferred token is in flight. With `lock` held."""
        if self._last is not None:
            mx.eval(self._last[0])
            self._last = None

    def first(self, compute: Callable[[], mx.array], cache: list[Any]) -> mx.array:
        """The first token, computed both ways."""
        wanted = compute()
        before = [mx.array(array) for array in _arrays(cache)]
        mx.eval(wanted, before)
        while not self.reason:
            trim_prompt_cache(cache, 1)
            problem = "deferred, it gives other bits"
            try:
                out = self.token(compute, cache)
            except (ExpertReadError, RuntimeError) as error:  # or a kernel that does not compile
                wanted, problem = compute(), str(error)
                mx.eval(wanted)
            else:
                pairs = list(zip([out, *_arrays(cache)], [wanted, *before], strict=True))
                if all(mx.array_equal(a, b).item() for a, b in pairs):
                    break
            if self.exchange is None:
                self.reason = problem
            else:  # wait for routers late instead
                self.exchange.give_back()
                self.exchange, self.exchange_reason = None, problem
        self.tried = True
        return wanted

    def token(self, compute: Callable[[], mx.array], cache: list[Any]) -> mx.array:
        """`compute()`, whose switches defer. Raises ExpertReadError with nothing in flight and `cache` as before."""
        with self.lock:
            mine = threading.get_ident(), current_stream()
            if self._last is not None and self._last[1] != mine:
                self.settled()
            self._running, self._pending = mine, None
            before = [c.offset for c in cache]
            exchange = self.exchange
            try:
                if exchange is not None:
                    exchange.begin(trial=not self.tried)
                out = compute()
                self.resolve()
                mx.async_eval(out)
                self._last = out, mine
                if exchange is not None:
                    exchange.finish()
                else:
                    self._pager.settle()
            except BaseException:
                self._pending = None
                mx.synchronize(mine[1])
                if exchange is not None:
                    exchange.abandon()
                for entry, offset in zip(cache, before, strict=True):
                    entry.trim(entry.offset - offset)
                raise
            finally:
                self._running = None
        return out

    def pending(self, switch: PagedSwitch, sent: list[mx.array]) -> None:
        """`switch` has returned a result whose experts nobody knows yet; its choice is on the way."""
        self._pending = switch, sent

    def resolve(self) -> None:
        """Have the experts of the layer before resident, and say where they are."""
        pending, self._pending = self._pending, None
        if pending is not None:
            switch, sent = pending
            switch.place(sent)


def _arrays(cache: list[Any]) -> list[mx.array]:
    return [array for entry in cache for array in entry.state if isinstance(array, mx.array)]


def install(model: nn.Module, deferral: Deferral) -> None:
    """Let `model` defer single tokens; its class becomes a subclass of its own."""
    base = type(model)

    class Deferred(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            if len(args) == 1 and options.keys() == {"cache"} and deferral.fits(args[0], options["cache"]):
                with deferral.lock:
                    compute = lambda: base.__call__(self, *args, **options)  # noqa: E731
                    if not deferral.tried:
                        return deferral.first(compute, options["cache"])
                    return deferral.token(compute, options["cache"])
            return base.__call__(self, *args, **options)

    Deferred.__name__, Deferred.__qualname__ = base.__name__, base.__qualname__
    model.__class__ = Deferred
