"""The `squizd` command: parse, call, map known errors to one line and an exit code.

Exit codes: 0 done; 1 a known error, or an invalid file; 2 wrong usage, or (validate) unreadable;
130 interrupted. Longer than other modules because every command's options and output lines are here, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import ContextError, ReadError, RequestError, SquizdError

if TYPE_CHECKING:
    from .evaluation import Result
    from .generation import Sampling, Session

_KNOWN_RECIPES = "int8, int4, int3, int2, mixed (experts 4, rest 8), mixed3, mixed2, mxfp4, keep"


# Calibration and gptq use NumPy's BLAS on many small matrices, where its threads, which spin while they wait for each
# other, made a busy machine ten to twenty times slower. To be set before NumPy is imported, which commands do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class _Group(click.Group):
    """Runs a command; turns errors into one line and a hint. (A broken pipe is click's to end quietly.)"""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would add an empty line, which only a terminal's ^C needs
            if sys.stderr.isatty():
                click.echo(err=True)
            raise click.exceptions.Abort from error

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            kwargs["standalone_mode"] = False
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.Abort:
            _fail("interrupted", "", 130)
        except click.ClickException as error:
            if isinstance(error, click.UsageError):
                error.show()
                sys.exit(error.exit_code)
            _fail(error.format_message(), "", error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", "", 130)
        except SquizdError as error:
            _debug()
            _fail(str(error), error.hint, 1)
        except (OSError, MemoryError) as error:
            _debug()
            _fail(str(error) or "out of memory", "", 1)
        except Exception as error:
            _debug()
            _fail(f"internal error: {type(error).__name__}: {error}", "SQUIZD_DEBUG=1 shows where; please report it", 1)


def _debug() -> None:
    if os.environ.get("SQUIZD_DEBUG") == "1":
        raise


def _fail(message: str, hint: str, code: int) -> NoReturn:
    click.echo(f"squizd: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="squizd")
def main() -> None:
    """Run Mixture-of-Experts models that do not fit in memory, without changing their answers."""


# -- compress --------------------------------------------------------------------------------------------


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(), help="The file to write.  [default: NAME-RECIPE.squizd]")
@click.option("--recipe", default="int4", show_default=True, help=f"Encodings: {_KNOWN_RECIPES}.")
@click.option("--quantizer",
              help="gptq (feedback; needs --calibration, then the default), mse (fitted; the default without), "
                   "or minmax (as mlx-lm quantizes).")  # fmt: skip
@click.option("--override", "overrides", multiple=True, metavar="PATTERN=SPEC",
              help="Encoding for tensor paths that match, the last match wins; "
                   "SPEC: keep, mxfp4, mxfp8, nvfp4, or bits 2-8 as 4 or 4g32.")  # fmt: skip
@click.option("--calibration", metavar="PATH", help="Text to weigh weights by: jsonl, plain text, or a folder.")
@click.option("--windows", default=256, show_default=True, type=click.IntRange(min=1), help="How much of it.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens of each window.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws the windows.")
@click.option("--statistics", metavar="FILE", help="Keep what was learned from the text here, or take it from here.")
@click.option("--target-bpw", type=click.FloatRange(min=1, max=16), metavar="BITS",
              help="Choose encodings for this many stored bits per weight; needs --calibration.")  # fmt: skip
@click.option("--target-size", metavar="SIZE", help="The same for a file of at most this size, as 16GB.")
@click.option("--plan", metavar="FILE", help="Encodings by tensor, as --save-plan wrote them and you may have edited.")
@click.option("--save-plan", metavar="FILE", help="Write the encodings that were chosen.")
@click.option("--plan-only", is_flag=True, help="Print the plan and stop.")
@click.option("--revision", help="Branch, tag or commit of a repository.")
@click.option("--keep-source", is_flag=True, help="Keep a repository's shards in the hub's cache.")
@click.option("--zstd", is_flag=True, help="Compress records with zstd: smaller to ship, slower to page.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def compress(source: str, output: str | None, recipe: str, as_json: bool, plan_only: bool, **options: Any) -> None:
    """Turn a Hugging Face checkpoint SOURCE (repository id or folder) into one .squizd file.

    Interrupted, it leaves OUTPUT.partial; the same command goes on from there.

    Example: squizd compress Qwen/Qwen3-30B-A3B -o qwen3.squizd --recipe mixed
    """
    _need_mlx()
    from tqdm import tqdm

    from .compression import compress as run_compress
    from .compression import plan as run_plan
    from .guide import Calibration
    from .runtime.budget import parse_size

    amount = {key: options.pop(key) for key in ("windows", "context", "seed")}
    if options["calibration"] is not None:
        options["calibration"] = Calibration(options["calibration"], **amount)
    if options["target_size"] is not None:
        options["target_size"] = parse_size(options["target_size"])
    chosen = f"{options['target_bpw']}bpw" if options["target_bpw"] else "plan" if options["plan"] else recipe
    target = output or f"{os.path.basename(os.path.abspath(source))}-{chosen}.squizd"
    calibrating = tqdm(unit="layer", desc="calibrate", disable=None, leave=False, delay=0.5)

    def preparing(done: int, total: int) -> None:
        if done < calibrating.n:  # the next pass
            calibrating.reset(total)
        calibrating.total = total
        calibrating.update(done - calibrating.n)

    options["preparing"] = preparing
    if plan_only:
        wanted = ("quantizer", "calibration", "statistics", "target_bpw", "target_size", "plan", "save_plan",
                  "zstd", "revision", "preparing")  # fmt: skip
        made = run_plan(source, **{key: options[key] for key in wanted})
        calibrating.close()
        click.echo(json.dumps(asdict(made)) if as_json else made.describe())
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="compress", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total is None:
                calibrating.close()
                bar.reset(total)
                bar.initial = done
            bar.update(done - bar.n)

        s = run_compress(source, target, recipe=recipe, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(asdict(s)))
        return
    if s.recipe == "keep" != recipe:
        click.echo(f"{source} is quantized for MLX already: stored as it comes, recipe {recipe} not applied", err=True)
    if s.unquantized:
        click.echo(
            f"not quantized, their rows fit no group: {len(s.unquantized)} tensors ({s.unquantized[0]}, ...)", err=True
        )
    resumed = f", resumed after {s.resumed} records" if s.resumed else ""
    click.echo(
        f"{s.path}: {_size(s.source_bytes)} -> {_size(s.file_bytes)}, {s.parameters / 1e6:,.1f} M parameters, "
        f"{s.bits_per_weight:.3f} bits per weight, {s.seconds:.1f} s{resumed}"
    )


# -- run ---------------------------------------------------------------------------------------------------


@main.command()
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
    from .runtime.ahead import announced

    with announced(file, memory, resident):  # before MLX is imported, which takes a second
        _run(file, prompt, memory, resident, context, o)


def _run(
    file: str,
    prompt: str | None,
    memory: str | None,
    resident: str | None,
    context: int | None,
    o: dict[str, Any],
) -> None:
    _need_mlx()
    from .generation import Sampling, Session, needed_context
    from .runtime.load import load_tokenizer

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
    from .generation import Conversation

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
    from .sides import peak_rss

    timing, stats = session.timing, session.stats
    rate = f"{timing.tokens_per_second:.1f} tokens/s, " if timing.tokens_per_second else ""
    click.echo(
        f"{timing.prompt_tokens} + {timing.generated_tokens} tokens, {rate}"
        f"first token {timing.first_token_seconds:.2f} s, hit rate {stats.hit_rate:.1%}, "
        f"{_size(stats.bytes_read)} read, peak memory {_size(peak_rss())}, {session.state.arithmetic}",
        err=True,
    )
    session.state.reset_stats()  # the next line of a chat counts the next answer


# -- validate, inspect -------------------------------------------------------------------------------------


@main.command()
@click.argument("file", type=click.Path())
@click.option("--deep", is_flag=True, help="Read everything: digests, zstd frames, padding, values.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(file: str, deep: bool, as_json: bool) -> int:
    """Check FILE against every rule of the format; exit code 0 valid, 1 invalid, 2 unreadable.

    Example: squizd validate --deep qwen3.squizd
    """
    from .container import validate as run_validate

    try:
        report = run_validate(file, deep=deep)
    except ReadError as error:
        _fail(str(error), error.hint, 2)
    if as_json:
        errors = [fault._asdict() for fault in report.errors]
        facts = {"path": file, "deep": deep, "ok": report.ok, "complete": report.complete, "errors": errors}
        click.echo(json.dumps(facts))
    elif report.ok:
        click.echo(f"{file}: valid{' (deep)' if deep else ''}")
    else:
        for fault in report.errors:
            click.echo(f"{file}: {fault.code} at byte {fault.offset}: {fault.message}", err=True)
        if not report.complete:
            click.echo(f"{file}: later checks were not made; there may be more", err=True)
    return 0 if report.ok else 1


@main.command()
@click.argument("file", type=click.Path())
@click.option("--expert", metavar="LAYER:EXPERT", help="Show one expert's tensors, with statistics of their values.")
@click.option("--tensor", metavar="NAME", help="Show one resident tensor, with statistics of its values.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(file: str, expert: str | None, tensor: str | None, as_json: bool) -> None:
    """Show what is inside FILE: sections, sizes by role, bits per weight, recipe, provenance.

    Example: squizd inspect qwen3.squizd --expert 0:17
    """
    from .container import open as open_file
    from .inspection import describe, describe_expert, describe_tensor

    if expert is not None or tensor is not None:
        with open_file(file) as f:
            found = describe_tensor(f, tensor) if tensor is not None else []
            if expert is not None:
                layer, separator, number = expert.partition(":")
                if not (separator and layer.isdecimal() and number.isdecimal()):
                    raise RequestError(f"{expert!r} is not LAYER:EXPERT", hint="for example --expert 0:17")
                found += describe_expert(f, int(layer), int(number))
        if as_json:
            click.echo(json.dumps(found))
            return
        for t in found:
            _echo_tensor(t)
        return
    with open_file(file) as f:
        facts = describe(f)
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{file}: {facts['model_type']}, {_size(facts['size'])}, {facts['bits_per_weight']:.3f} bits per weight")
    click.echo(f"file id   {facts['file_id']}")
    click.echo("roles     " + "; ".join(_role_line(role, r) for role, r in facts["roles"].items()))
    experts = facts["experts"]
    click.echo(f"experts   {experts['layers']} layers, {experts['records']} records of {experts['encodings']}")
    click.echo("sections  " + ", ".join(f"{s['type']} {_size(s['stored_size'])}" for s in facts["sections"]))
    click.echo(f"recipe    {json.dumps(facts['recipe'])}")
    click.echo(f"source    {json.dumps(facts['source'])}")
    click.echo(f"files     {', '.join(facts['files']) or 'none'}")


def _echo_tensor(t: dict[str, Any]) -> None:
    shape, record = "x".join(map(str, t["shape"])), t["record"]
    click.echo(f"{t['name']}  {t['role']}, {t['encoding']}, {shape}, {_size(t['bytes'])}")
    click.echo(f"    record at {record['offset']}, {record['stored_size']} bytes, xxh64 {record['digest']}")
    values = ", ".join(f"{key} {t[key]:.6g}" for key in ("min", "max", "mean", "std"))
    click.echo(f"    {values}, zeros {t['zeros']:.1%}")


def _role_line(role: str, facts: dict[str, Any]) -> str:
    return f"{role} {facts['parameters'] / 1e6:,.1f} M at {facts['bits_per_weight']:.2f}"


@main.command()
@click.argument("file", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write.")
@click.option("--codec", type=click.Choice(["raw", "zstd"]), help="How to store records.  [default: as they are]")
@click.option("--drop", multiple=True, metavar="TYPE", help="Leave out an appendix, as PROF.")
@click.option(
    "--add", multiple=True, metavar="TYPE=PATH", help="Add or replace an appendix from a file, as PROF=profile.jsonl."
)
@click.option("--force", is_flag=True, help="Replace an existing output file.")
def repack(file: str, output: str, codec: str | None, drop: tuple[str, ...], add: tuple[str, ...], force: bool) -> None:
    """Write FILE again: records raw or zstd, appendices added or left out, values untouched.

    Example: squizd repack qwen3.squizd -o qwen3-small.squizd --codec zstd
    """
    from pathlib import Path

    from tqdm import tqdm

    from .repack import repack as run_repack

    contents = {}
    for text in add:
        kind, separator, path = text.partition("=")
        if not separator:
            raise RequestError(f"{text!r} is not TYPE=PATH", hint="for example --add PROF=profile.jsonl")
        contents[kind] = Path(path).read_bytes()
    with tqdm(unit="B", unit_scale=True, desc="repack", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        run_repack(file, output, codec=codec, drop=drop, add=contents, force=force, progress=progress)
    click.echo(
        f"{file}: {_size(os.path.getsize(file))} -> {output}: {_size(os.path.getsize(output))}, payload unchanged"
    )


# -- profile, fit ------------------------------------------------------------------------------------------


@main.command()
@click.argument("file", type=click.Path())
@click.option("--text", required=True, type=click.Path(exists=True), help="Text, .jsonl rows of text, or a folder.")
@click.option("--tokens", default=8192, show_default=True, type=click.IntRange(min=1), help="Use so many at most.")
@click.option("-o", "--output", type=click.Path(), help="The file to write.  [default: FILE itself]")
@click.option("--memory", metavar="SIZE", help="Budget while the text runs, as 6GB.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def profile(file: str, text: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Record which experts a text uses, and store that in FILE: it starts warm, and its layers get slots by need.

    Example: squizd profile qwen3.squizd --text notes/
    """
    _need_mlx()
    from tqdm import tqdm

    from .profiling import profile as run_profile

    with tqdm(unit="token", desc="profile", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        s = run_profile(file, text, output, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(asdict(s)))
        return
    rates = ", ".join(f"{rate:.1%} with {share} resident" for share, rate in s.hit_rate.items())
    click.echo(f"{s.path}: {s.tokens} tokens of {s.texts} texts through {s.layers} expert layers; hit rate {rates}")
    if s.unobserved:
        click.echo(f"gate weights of {s.unobserved} layers cannot be observed: stored as equal shares", err=True)


@main.command()
@click.argument("file", type=click.Path())
@click.option("--memory", multiple=True, metavar="SIZE", help="A budget, as 6GB; repeat it.  [default: 100 % to least]")
@click.option("--context", type=click.IntRange(min=2), help="Tokens to reserve cache for.  [default: 4096]")
@click.option("--measure/--no-measure", default=True, help="Time the disk and some tokens.  [default: measure]")
@click.option("--plot", type=click.Path(), metavar="OUT", help="Draw the table as OUT.svg or OUT.html.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def fit(
    file: str, memory: tuple[str, ...], context: int | None, measure: bool, plot: str | None, as_json: bool
) -> None:
    """Predict for FILE on this machine: budget against hit rate, bytes read per token, tokens a second.

    Example: squizd fit qwen3.squizd --memory 4GB --memory 8GB --plot fit.svg
    """
    _need_mlx()
    from .fitting import fit as run_fit
    from .plotting import draw, table

    if plot is not None and not plot.lower().endswith((".svg", ".html")):
        raise RequestError(f"{plot} is no name for a plot", hint="end it in .svg or .html")
    found = run_fit(file, memory=memory, context=context, measure=measure)
    if plot is not None:
        with open(plot, "w", encoding="utf-8") as picture:
            picture.write(draw(found, html=plot.lower().endswith(".html")))
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    click.echo("\n".join(table(found)))
    click.echo(found.explanation, err=True)
    if found.compute_seconds is not None and found.bytes_per_second_warm is not None:
        rates = [r for r in (found.bytes_per_second_cold, found.bytes_per_second_warm) if r is not None]
        speeds = " cold, ".join(f"{_size(rate)}/s" for rate in rates)
        click.echo(
            f"measured: {found.compute_seconds * 1e3:.2f} ms a token without reading; experts at {speeds} from cache",
            err=True,
        )


# -- bench -----------------------------------------------------------------------------------------------


@main.command()
@click.argument("file", type=click.Path())
@click.option("-p", "--prompt", help="What every trial begins with.  [default: a sentence]")
@click.option("-n", "--tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens of each trial.")
@click.option(
    "--trials", default=30, show_default=True, type=click.IntRange(min=1), help="After one that is not counted."
)
@click.option("--memory", "--budget", metavar="SIZE", help="Budget for weights, cache and work space, as 6GB.")
@click.option("--resident", metavar="SHARE", help="Share of the experts to keep in memory, as 25%.")
@click.option("--against", multiple=True, type=click.Choice(["mlx-lm", "mlx-lm-f32", "llama.cpp"]),
              help="Take turns with mlx-lm on the same weights, in the file's number types or in float32, or with "
                   "llama.cpp; repeat it.")  # fmt: skip
@click.option("--gguf", type=click.Path(), metavar="FILE", help="What llama.cpp runs.")
@click.option("--threads", default=0, type=click.IntRange(min=0),
              help="Of squizd's kernels and of llama.cpp.  [default: one for each core]")  # fmt: skip
@click.option("--check/--no-check", default=True, help="Compare logits with a resident model's.  [default: check]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def bench(file: str, check: bool, as_json: bool, **o: Any) -> int:
    """Measure FILE here: time to first token, tokens a second, hit rate, bytes read, memory, in trials.

    Exit code 1 where logits within the budget are not bit for bit those of a resident model (on CPU).

    Example: squizd bench qwen3.squizd --memory 6GB --against mlx-lm
    """
    _need_mlx()
    from tqdm import tqdm

    from .measuring import bench as run_bench
    from .measuring import table

    with tqdm(unit="trial", desc="bench", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = run_bench(file, checked=check, progress=progress, **o)
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(table(found)))
    return 1 if found.exact.failed else 0


# -- eval ------------------------------------------------------------------------------------------------


@main.command("eval")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option("--text", required=True, type=click.Path(), help="Text to predict: jsonl, plain text, or a folder.")
@click.option("--reference", metavar="SOURCE", help="Compare with this checkpoint (in float32) or other .squizd file.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens of each text.")
@click.option(
    "--texts", default=40, show_default=True, type=click.IntRange(min=1), help="How many texts, evenly spread."
)
@click.option("--memory", metavar="SIZE", help="Budget for each FILE, as 6GB.")
@click.option(
    "--cache", type=click.Path(), help="Folder to keep the reference's results in.  [default: ~/.cache/squizd]"
)
@click.option("--report", type=click.Path(), help="Write a page that compares the files: KL divergence against bits.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per file.")
def evaluate(files: tuple[str, ...], text: str, report: str | None, cache: str | None, as_json: bool, **o: Any) -> None:
    """Measure FILE's perplexity on a text, and how far its answers are from a reference's.

    Example: squizd eval qwen3.squizd --reference Qwen/Qwen3-30B-A3B --text held-out.jsonl
    """
    _need_mlx()
    from pathlib import Path

    from tqdm import tqdm

    from . import corpus
    from . import report as reports
    from .evaluation import evaluate as run_evaluate

    found = []
    read = corpus.read(text)
    for file in files:
        with tqdm(unit="text", desc=os.path.basename(file), disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found.append(run_evaluate(file, read, cache=Path(cache) if cache else None, progress=progress, **o))
        click.echo(json.dumps(found[-1].describe()) if as_json else _evaluated(found[-1]))
    if report:
        reports.write(report, found)


def _evaluated(r: Result) -> str:
    lines = [
        f"{r.file}: {r.bits_per_weight:.3f} bits per weight, perplexity {r.perplexity:.3f} ± {r.perplexity_error:.3f} "
        f"on {r.tokens} tokens of {r.texts} texts"
    ]
    if r.kld_mean is not None:
        lines.append(f"    reference perplexity {r.reference_perplexity:.3f}, top-1 agreement {r.top1_agreement:.2%}")
        lines.append(
            f"    KL divergence {r.kld_mean:.5f} ± {r.kld_mean_error:.5f}, median {r.kld_median:.5f}, "
            f"99 % {r.kld_99:.4f}, 99.9 % {r.kld_999:.4f}, max {r.kld_max:.4f}"
        )
        shares = " ".join(f"{share:.1%}" for share in r.router_agreement.values())
        lines += [f"    experts agree, layer by layer: {shares}"] if shares else []
    return "\n".join(lines)


# -- shared ------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _need_mlx() -> None:
    from .backend import require

    require()


if __name__ == "__main__":
    main()
