"""Text from a loaded model: one prompt, a stream, or a conversation that keeps its cache.

mlx-lm does the generating; this module adds the context check, the prefill chunk that the budget
allows, and the reuse of a conversation's cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate as _mlx_stream
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import ContextError, ReadError, RequestError
from .runtime.caches import GROUP_SIZE
from .runtime.device import trim
from .runtime.load import Residency, load_model, load_tokenizer, state

Message = dict[str, str]
DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the likeliest; 0 or 1 turn the others off."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def sampler(self) -> Any:
        """mlx-lm's sampler with these settings; seeds MLX's generator where a seed is given."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        return make_sampler(self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)


@dataclass(frozen=True)
class Part:
    """A piece of the answer. `finish_reason` is None until the last, then "stop" or "length"."""

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int


@dataclass
class Timing:
    """Seconds to the first token, and tokens a second after it (0 with fewer than two tokens)."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0


def encode(tokenizer: TokenizerWrapper, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own start token; RequestError if there is none."""
    ids = list(prompt) if not isinstance(prompt, str) else list(tokenizer.encode(prompt))
    if not ids:
        raise RequestError("the prompt is empty")
    vocabulary = len(tokenizer)
    if any(not 0 <= i < vocabulary for i in ids):
        raise RequestError(f"a token id is outside the vocabulary of {vocabulary}")
    return ids


def render_chat(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation under the model's own template, ready for the answer."""
    if not tokenizer.has_chat_template:
        raise RequestError("this model has no chat template", hint="use --no-chat, or generate() with a plain prompt")
    return list(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def prompt_ids(tokenizer: TokenizerWrapper, prompt: str | Sequence[int], *, chat: bool, system: str = "") -> list[int]:
    """Token ids of one prompt: as it is, or as the first message of a conversation."""
    if not chat:
        return encode(tokenizer, prompt)
    if not isinstance(prompt, str):
        raise RequestError("a chat message is text, not token ids")
    return render_chat(tokenizer, [*Conversation(system).messages, {"role": "user", "content": prompt}])


def needed_context(
    tokenizer: TokenizerWrapper, prompt: str | Sequence[int], max_tokens: int, *, chat: bool, system: str = ""
) -> int:
    """Tokens of cache that one prompt and its answer need."""
    return len(prompt_ids(tokenizer, prompt, chat=chat, system=system)) + max_tokens


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = DEFAULT_TOKENS,
    sampling: Sampling | None = None,
    prompt_cache: list[Any] | None = None,
    cached_tokens: int = 0,
    timing: Timing | None = None,
) -> Iterator[Part]:
    """Generate from `prompt` (text or token ids), yielding text as it comes.

    `prompt_cache` (by default an empty one of the kind that the model was loaded for) holds `cached_tokens` tokens
    that precede `prompt`. `timing` is filled in as the stream goes. Raises ContextError before the first token if
    prompt and answer exceed the context that the budget reserved, and ExpertReadError instead of any token whose
    expert cannot be read.
    """
    ids = encode(tokenizer, prompt)
    loaded = state(model)
    needed = cached_tokens + len(ids) + max_tokens
    if needed > loaded.context:
        raise ContextError(
            f"{cached_tokens + len(ids)} prompt tokens and {max_tokens} to generate exceed the reserved context "
            f"of {loaded.context}",
            hint=f"reserve more with --context {needed} (context= in Python), or ask for fewer tokens",
        )
    clock, first = time.perf_counter(), 0.0
    spans = timing if timing is not None else Timing()
    spans.prompt_tokens = len(ids)
    try:
        for response in _mlx_stream(
            model,
            tokenizer,
            ids,
            max_tokens=max_tokens,
            sampler=(sampling or Sampling()).sampler(),
            prompt_cache=loaded.caches.make(model) if prompt_cache is None else prompt_cache,
            prefill_step_size=loaded.prefill_step_size,
            **loaded.caches.steps,
        ):
            if loaded.replay is not None and loaded.replay.in_use and _is_nothing(response.logprobs):
                mx.synchronize(generation_stream)  # raises what failed
                raise ReadError(f"{loaded.file.path}: a token could not be computed", hint="ask again")
            now = time.perf_counter()
            if not first:
                first, spans.first_token_seconds = now, now - clock
            spans.generated_tokens = response.generation_tokens
            if now > first:
                spans.tokens_per_second = (response.generation_tokens - 1) / (now - first)
            yield Part(response.text, response.token, response.finish_reason, len(ids), response.generation_tokens)
    finally:
        _forget()
        trim()


def _is_nothing(logprobs: mx.array) -> bool:
    """Whether a replayed token failed: MLX says so to whoever waits for it, and to nobody if it is there already."""
    return bool(np.isnan(np.array(logprobs, copy=False).reshape(-1)[0]))


def _forget() -> None:
    """Wait for a token that this thread began ahead and nobody asks for: what failed in it is no error of the next."""
    try:
        mx.synchronize(generation_stream)
    except ReadError:
        pass


def generate(path: str | os.PathLike[str], prompt: str | Sequence[int], **options: Any) -> str:
    """Load `path`, answer one prompt, close. Options are those of `Session` and `Session.generate`.

    Reserves the context that prompt and answer need, unless `context` is given.
    """
    names = ("memory", "resident", "context", "kv_bits", "kv_group_size", "max_kv_size")
    loading = {key: options.pop(key) for key in names if key in options}
    tokenizer = load_tokenizer(path)
    if loading.get("context") is None:
        tokens, chat = options.get("max_tokens", DEFAULT_TOKENS), options.get("chat", False)
        loading["context"] = needed_context(tokenizer, prompt, tokens, chat=chat, system=options.get("system", ""))
    with Session(path, tokenizer=tokenizer, **loading) as session:
        return session.generate(prompt, **options)


@dataclass
class Conversation:
    """Messages so far and the cache that holds their tokens; grows by what is new each turn."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)
    cache: list[Any] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system:
            self.messages.insert(0, {"role": "system", "content": self.system})


class Session:
    """A loaded file: answers prompts and holds conversations within one budget. A context manager."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: str | int | None = None,
        resident: str | float | None = None,
        context: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = GROUP_SIZE,
        max_kv_size: int | None = None,
        tokenizer: TokenizerWrapper | None = None,
    ) -> None:
        """See `squizd.load` for all but the tokenizer, and for what is raised."""
        self.tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        self.model = load_model(
            path,
            memory=memory,
            resident=resident,
            context=context,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            max_kv_size=max_kv_size,
        )
        self.state: Residency = state(self.model)
        self.timing = Timing()

    @property
    def stats(self) -> Any:
        """hits, misses, bytes_read, resident_bytes and more, counted since loading."""
        return self.state.stats

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_TOKENS,
        chat: bool = False,
        system: str = "",
        sampling: Sampling | None = None,
    ) -> Iterator[Part]:
        """Stream the answer to one prompt, as a chat message where `chat` is set."""
        ids = prompt_ids(self.tokenizer, prompt, chat=chat, system=system)
        self.timing = Timing()
        yield from stream_generate(
            self.model, self.tokenizer, ids, max_tokens=max_tokens, sampling=sampling, timing=self.timing
        )

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The whole answer to one prompt; options as for `stream`."""
        return "".join(part.text for part in self.stream(prompt, **options))

    def reply(
        self, conversation: Conversation, message: str, *, max_tokens: int = 512, sampling: Sampling | None = None
    ) -> Iterator[Part]:
        """Stream the answer to the next message; `conversation` keeps it once the stream ends.

        Only tokens that the cache does not hold are computed. A model whose cache cannot be cut back
        starts its cache anew when the template changed what came before. If the stream is abandoned
        or fails, the conversation is as it was, with an empty cache.
        """
        messages = [*conversation.messages, {"role": "user", "content": message}]
        ids = render_chat(self.tokenizer, messages)
        kept = self._keep_prefix(conversation, ids)
        cache, tokens = conversation.cache, ids[:]
        conversation.cache, conversation.tokens = [], []
        budget = min(max_tokens, self.state.context - len(ids))
        if budget < 1:
            raise ContextError(
                f"the conversation has reached {len(ids)} tokens, the reserved context is {self.state.context}",
                hint="start a new conversation, or reserve more with --context",
            )
        self.timing, text = Timing(), []
        for part in stream_generate(
            self.model, self.tokenizer, ids[kept:], max_tokens=budget, sampling=sampling,
            prompt_cache=cache, cached_tokens=kept, timing=self.timing,
        ):  # fmt: skip
            tokens.append(part.token)
            text.append(part.text)
            yield part
        conversation.messages = [*messages, {"role": "assistant", "content": "".join(text)}]
        conversation.cache, conversation.tokens = cache, tokens

    def _keep_prefix(self, conversation: Conversation, ids: list[int]) -> int:
        """Cut the cache back to what `ids` share with it, leaving at least one token to compute."""
        # The last sampled token was never fed to the model, so the cache may be one short of `tokens`.
        cached = len(conversation.tokens)
        if conversation.cache and hasattr(conversation.cache[0], "offset"):
            cached = min(cached, int(conversation.cache[0].offset))
        shared = 0
        limit = min(cached, len(ids) - 1)
        while shared < limit and ids[shared] == conversation.tokens[shared]:
            shared += 1
        surplus = cached - shared
        if conversation.cache and surplus and not can_trim_prompt_cache(conversation.cache):
            shared = 0
        elif surplus:
            trim_prompt_cache(conversation.cache, surplus)
        if not shared:
            conversation.cache = self.state.caches.make(self.model)
        return shared

    def close(self) -> None:
        """Release the file and its reading threads; closing twice is fine."""
        self.state.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
