"""`squizd run`: one answer, or a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import ContextError, RequestError
from .shared import need_mlx, size

if TYPE_CHECKING:
    from ..generation import Sampling, Session


@click.command()
@click.argument("file", type=click.Path())
@click.option("-p", "--prompt", help="The prompt; '-' reads it from standard input.")
@click.option("-n", "--max-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--memory", metavar="SIZE", help="Budget for weights, cache and work space, as 6GB.")
@click.option("--resident", metavar="SHARE", help="Share of the experts to keep in memory, as 25%.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens to reserve cache for.  [default: what the prompt needs; chat: 4096]",
)
@click.option("--kv-bits", type=click.Choice(["2", "3", "4", "8"]),
              help="Keep the cache in so many bits, as mlx-lm does; changes answers.")  # fmt: skip
@click.option("--kv-group-size", default="64", show_default=True, type=click.Choice(["32", "64", "128"]),
              help="Numbers of the cache that share a scale.")  # fmt: skip
@click.option("--max-kv-size", type=click.IntRange(min=5), metavar="TOKENS",
              help="Keep the first 4 and the latest tokens in the cache, no more than these.")  # fmt: skip
@click.option(
    "--temp", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 always takes the likeliest token."
)
@click.option(
    "--top-p",
    default=0.0,
    type=click.FloatRange(0, 1),
    help="Draw from the likeliest tokens of this total probability.",
)
@click.option("--top-k", default=0, type=click.IntRange(min=0), help="Draw from the K likeliest tokens.")
@click.option(
    "--min-p", default=0.0, type=click.FloatRange(0, 1), help="Drop tokens below this share of the likeliest."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes drawn answers repeatable.")
@click.option("--chat/--no-chat", default=None, help="Use the model's chat template.  [default: if it has one]")
@click.option("--system", default="", help="System message of the chat.")
@click.option("--quiet", is_flag=True, help="No statistics line.")
def run(file: str, prompt: str | None, memory: str | None, resident: str | None, context: int | None, **o: Any) -> None:
    """Answer a prompt, or chat if there is none, within a memory budget.

    Example: squizd run qwen3.squizd --memory 6GB -p "Why is the sky blue?"
    """
    need_mlx()
    from ..generation import Sampling, Session, needed_context
    from ..runtime.load import load_tokenizer

    sampling = Sampling(o["temp"], o["top_p"], o["top_k"], o["min_p"], o["seed"])
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text at byte {error.start}") from error
    for text in (prompt or "", o["system"]):
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):  # bytes that Python could not read
            raise RequestError("the prompt is not UTF-8 text")
    tokenizer = load_tokenizer(file)
    chat = tokenizer.has_chat_template if o["chat"] is None else o["chat"]
    system = o["system"] if chat else ""
    if prompt is not None and context is None:
        context = needed_context(tokenizer, prompt, o["max_tokens"], chat=chat, system=system)
    kv = {"kv_bits": o["kv_bits"] and int(o["kv_bits"]), "kv_group_size": int(o["kv_group_size"])}
    kv["max_kv_size"] = o["max_kv_size"]
    with Session(file, memory=memory, resident=resident, context=context, tokenizer=tokenizer, **kv) as session:
        if prompt is None:
            _converse(session, chat, sampling, o)
        else:
            parts = session.stream(prompt, max_tokens=o["max_tokens"], chat=chat, system=system, sampling=sampling)
            for part in parts:
                click.echo(part.text, nl=False)
            click.echo()
            _statistics(session, o)


def _converse(session: Session, chat: bool, sampling: Sampling, o: dict[str, Any]) -> None:
    """A conversation at the terminal: Ctrl-C stops an answer, Ctrl-D or /exit leaves, /new starts over."""
    from ..generation import Conversation

    try:
        import readline  # noqa: F401 - line editing for input()
    except ImportError:
        pass
    click.echo("Ctrl-C stops an answer, /new starts over, /exit or Ctrl-D leaves.", err=True)
    conversation = Conversation(o["system"])
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if line == "/exit":
            return
        if line == "/new":
            conversation = Conversation(o["system"])
        if not line or line == "/new":
            continue
        try:
            if chat:
                parts = session.reply(conversation, line, max_tokens=o["max_tokens"], sampling=sampling)
            else:
                parts = session.stream(line, max_tokens=o["max_tokens"], sampling=sampling)
            for part in parts:
                click.echo(part.text, nl=False)
            click.echo()
        except KeyboardInterrupt:
            click.echo(" (stopped)")
            continue
        except ContextError as error:
            click.echo(f"squizd: {error}\nhint: {error.hint}", err=True)
            continue
        _statistics(session, o)


def _statistics(session: Session, o: dict[str, Any]) -> None:
    if o["quiet"]:
        return
    from ..sides import peak_rss

    timing, stats = session.timing, session.stats
    rate = f"{timing.tokens_per_second:.1f} tokens/s, " if timing.tokens_per_second else ""
    click.echo(
        f"{timing.prompt_tokens} + {timing.generated_tokens} tokens, {rate}"
        f"first token {timing.first_token_seconds:.2f} s, hit rate {stats.hit_rate:.1%}, "
        f"{size(stats.bytes_read)} read, peak memory {size(peak_rss())}, {session.state.arithmetic}",
        err=True,
    )
    session.state.reset_stats()  # the next line of a chat counts the next answer
