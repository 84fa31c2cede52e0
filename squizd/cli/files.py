"""`squizd validate`, `inspect`, `repack`: what is in a file, which needs no MLX."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..errors import ReadError, RequestError
from .shared import bar, fail, size


@click.command()
@click.argument("file", type=click.Path())
@click.option("--deep", is_flag=True, help="Read everything: digests, zstd frames, padding, values.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(file: str, deep: bool, as_json: bool) -> int:
    """Check FILE against every rule of the format; exit code 0 valid, 1 invalid, 2 unreadable.

    Example: squizd validate --deep qwen3.squizd
    """
    from ..container import validate as run_validate

    try:
        report = run_validate(file, deep=deep)
    except ReadError as error:
        fail(str(error), error.hint, 2)
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


@click.command()
@click.argument("file", type=click.Path())
@click.option("--expert", metavar="LAYER:EXPERT", help="Show one expert's tensors, with statistics of their values.")
@click.option("--tensor", metavar="NAME", help="Show one resident tensor, with statistics of its values.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(file: str, expert: str | None, tensor: str | None, as_json: bool) -> None:
    """Show what is inside FILE: sections, sizes by role, bits per weight, recipe, provenance.

    Example: squizd inspect qwen3.squizd --expert 0:17
    """
    from ..container import open as open_file
    from ..inspection import describe, describe_expert, describe_tensor

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
    click.echo(f"{file}: {facts['model_type']}, {size(facts['size'])}, {facts['bits_per_weight']:.3f} bits per weight")
    click.echo(f"file id   {facts['file_id']}")
    click.echo("roles     " + "; ".join(_role_line(role, r) for role, r in facts["roles"].items()))
    experts = facts["experts"]
    click.echo(f"experts   {experts['layers']} layers, {experts['records']} records of {experts['encodings']}")
    click.echo("sections  " + ", ".join(f"{s['type']} {size(s['stored_size'])}" for s in facts["sections"]))
    click.echo(f"recipe    {json.dumps(facts['recipe'])}")
    click.echo(f"source    {json.dumps(facts['source'])}")
    click.echo(f"files     {', '.join(facts['files']) or 'none'}")


def _echo_tensor(t: dict[str, Any]) -> None:
    shape, record = "x".join(map(str, t["shape"])), t["record"]
    click.echo(f"{t['name']}  {t['role']}, {t['encoding']}, {shape}, {size(t['bytes'])}")
    click.echo(f"    record at {record['offset']}, {record['stored_size']} bytes, xxh64 {record['digest']}")
    values = ", ".join(f"{key} {t[key]:.6g}" for key in ("min", "max", "mean", "std"))
    click.echo(f"    {values}, zeros {t['zeros']:.1%}")


def _role_line(role: str, facts: dict[str, Any]) -> str:
    return f"{role} {facts['parameters'] / 1e6:,.1f} M at {facts['bits_per_weight']:.2f}"


@click.command()
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

    from ..repack import repack as run_repack

    contents = {}
    for text in add:
        kind, separator, path = text.partition("=")
        if not separator:
            raise RequestError(f"{text!r} is not TYPE=PATH", hint="for example --add PROF=profile.jsonl")
        contents[kind] = Path(path).read_bytes()
    with bar("repack", "B") as progress:
        run_repack(file, output, codec=codec, drop=drop, add=contents, force=force, progress=progress)
    click.echo(f"{file}: {size(os.path.getsize(file))} -> {output}: {size(os.path.getsize(output))}, payload unchanged")
