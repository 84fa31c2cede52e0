"""The command line: failures are one line, `run` streams, numbers agree with the files."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CommandLine, Outcome, mount
from tokenizers import Tokenizer

import squizd

Make = Callable[..., Path]
PROMPT = "The city was founded in"
STATISTICS = re.compile(
    r"(\d+) \+ (\d+) tokens, [\d.]+ tokens/s, first token [\d.]+ s, hit rate ([\d.]+)%, "
    r"[\d.]+ (?:B|kB|MB|GB) read, peak memory [\d.]+ (?:MB|GB), (?:squizd kernels \(.+ threads\)|MLX.*)\n"
)


def answer(cli: CommandLine, file: Path, *options: str, stdin: str | bytes | None = None) -> str:
    """What `run --no-chat` writes of 12 tokens."""
    return cli("run", file, "--no-chat", "-n", "12", *options, stdin=stdin).success().out


# compress: what stops it leaves nothing under the final name


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a file", "no/such/path/here", "a b", ""])
def test_wrong_sources(source: str, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("text")
    cli("compress", source, "-o", tmp_path / "x.squizd").failure()
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def damage(folder: Path, how: str) -> None:
    shard, config = folder / "model-00001-of-00002.safetensors", folder / "config.json"
    match how:
        case "missing shard":
            shard.unlink()
        case "truncated shard":
            os.truncate(shard, shard.stat().st_size - 4096)
        case "unknown architecture":
            config.write_text('{"model_type": "no_such_model"}')
        case "no config.json":
            config.unlink()


@pytest.mark.parametrize("how", ["missing shard", "truncated shard", "unknown architecture", "no config.json"])
def test_broken_checkpoints(how: str, checkpoint: Path, tmp_path: Path, cli: CommandLine) -> None:
    damage(checkpoint, how)
    assert str(checkpoint) in cli("compress", checkpoint, "-o", tmp_path / "x.squizd").failure()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "options",
    [["--recipe", "int5"], ["--quantizer", "best"], ["--override", "x"], ["--override", "*=9"], ["--override", "x=4"]],
)
def test_options_that_make_no_sense(options: list[str], tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    cli("compress", tiny, "-o", tmp_path / "x.squizd", *options).failure()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["no/such/folder/x.squizd", ".", "a file/x.squizd", "a file"])
def test_wrong_targets(target: str, tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    (tmp_path / "a file").write_text("text")
    cli("compress", tiny, "-o", tmp_path / target).failure()
    assert (tmp_path / "a file").read_text() == "text"
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_a_disk_that_is_too_small_is_refused_at_once(disk: Path, tiny: Path, cli: CommandLine) -> None:
    message = cli("compress", tiny, "-o", disk / "x.squizd").failure()
    assert "no space left on device" in message
    assert [p.name for p in disk.iterdir()] == ["x.squizd.partial"]


def test_a_disk_that_fills_up_leaves_a_run_to_go_on_with(
    disk: Path, tiny: Path, cli: CommandLine, tiny_file: Make
) -> None:
    command = ["compress", str(tiny), "-o", str(disk / "x.squizd"), "--zstd", "--quantizer", "minmax", "--json"]
    assert "No space left on device\nhint: free some space" in cli(*command).failure()
    assert [p.name for p in disk.iterdir()] == ["x.squizd.partial"]
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    assert json.loads(cli(*command).success().out)["resumed"] > 0
    assert (disk / "x.squizd").read_bytes() == tiny_file(zstd=True).read_bytes()


def test_a_file_size_limit_is_an_error_too(tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        outcome = cli("compress", tiny, "-o", tmp_path / "x.squizd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in outcome.failure()
    assert [p.name for p in tmp_path.iterdir()] == ["x.squizd.partial"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to, root included."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount(folder, "ro,size=1m")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_folder(read_only: Path, tiny: Path, cli: CommandLine) -> None:
    assert "read-only" in cli("compress", tiny, "-o", read_only / "x.squizd").failure()
    assert not list(read_only.iterdir())


def test_ctrl_c_during_compress(tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    slowly = cli.environment(SQUIZD_KERNELS="0")
    partial = tmp_path / "x.squizd.partial"
    for _ in range(5):  # on a busy machine it may be done before this process is woken
        process = cli.start("compress", tiny, "-o", tmp_path / "x.squizd", "--force", env=slowly)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > 200_000):  # at work
            time.sleep(0.0005)
        process.send_signal(signal.SIGINT)
        outcome = cli.finish(process)
        if outcome.code:
            break
        (tmp_path / "x.squizd").unlink()
    assert outcome == Outcome(130, "", "squizd: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["x.squizd.partial"]


def test_compress_ends_with_a_line_of_figures(tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    target = tmp_path / "x.squizd"
    out = cli("compress", tiny, "-o", target, "--recipe", "int8", "--quantizer", "minmax").success().out
    source = sum(p.stat().st_size for p in tiny.glob("*.safetensors")) / 1e6
    with squizd.open(target) as f:
        stored = sum(t.weight_bytes for t, _ in f.residents.values())
        stored += sum(t.weight_bytes for t in f.layouts[0].tensors) * sum(x.expert_count for x in f.moe_layers)
        count = sum(t.parameters for t, _ in f.residents.values())
        count += sum(t.parameters for t in f.layouts[0].tensors) * sum(x.expert_count for x in f.moe_layers)
    sizes = f"{source:.1f} MB -> {target.stat().st_size / 1e6:.1f} MB"
    figures = f"{count / 1e6:.1f} M parameters, {stored * 8 / count:.3f} bits per weight"
    assert re.fullmatch(re.escape(f"{target}: {sizes}, {figures}, ") + r"[\d.]+ s\n", out)


def test_compress_names_its_output_after_source_and_recipe(
    tiny: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli("compress", f"{tiny}/", "--recipe", "int2", "--quantizer", "minmax").success()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-moe-int2.squizd"]


# run, validate and inspect on what is no whole file


def broken(folder: Path, how: str, file: Path) -> Path:
    path = folder / "broken.squizd"
    match how:
        case "nothing there":
            pass
        case "a folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("This is a text file, renamed.\n" * 100)
        case "a safetensors file":
            path.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}".ljust(500))
        case "random":
            path.write_bytes(os.urandom(100_000))
        case "sparse":
            path.touch()
            os.truncate(path, 1 << 30)
        case _:  # cut at
            path.write_bytes(file.read_bytes()[: int(how)])
    return path


WAYS = ["nothing there", "a folder", "empty", "text", "a safetensors file", "random", "sparse"]
CUTS = ["8", "255", "256", "1000", "20000", "200000", "-1"]


@pytest.mark.parametrize("how", WAYS + CUTS)
def test_what_is_no_whole_file_is_refused_by_all(how: str, tmp_path: Path, cli: CommandLine, tiny_file: Make) -> None:
    path = broken(tmp_path, how, tiny_file())
    for command in (["run", path, "-p", "x"], ["inspect", path], ["inspect", path, "--json"]):
        assert str(path) in cli(*command).failure()
    if how in WAYS[:2]:
        assert str(path) in cli("validate", path).failure(2)
    else:
        outcome = cli("validate", path)
        assert (outcome.code, outcome.out) == (1, "")
        *faults, last = outcome.err.splitlines()
        assert last == f"{path}: later checks were not made; there may be more"
        assert faults
        assert all(re.match(rf"{path}: [a-z0-9-]+ at byte \d+: ", line) for line in faults)


def test_damage_to_an_expert_stops_the_answer(tmp_path: Path, cli: CommandLine, tiny_file: Make) -> None:
    data = bytearray(tiny_file().read_bytes())
    with squizd.open(tiny_file()) as f:
        offsets = [f.expert(2, expert).offset for expert in range(f.moe_layers[2].expert_count)]
    for offset in offsets:
        data[offset + 100] ^= 1
    path = tmp_path / "x.squizd"
    path.write_bytes(data)
    for resident in ("100%", "25%"):
        outcome = cli("run", path, "--no-chat", "-p", PROMPT, "--resident", resident)
        found = re.search(r"layer 2 expert (\d+) at byte (\d+)", outcome.failure())
        assert found
        assert offsets[int(found[1])] == int(found[2])
        assert outcome.out == ""
    assert cli("validate", path).success().out == f"{path}: valid\n"
    report = cli("validate", path, "--deep", "--json")
    errors = json.loads(report.out)["errors"]
    assert (report.code, {e["code"] for e in errors}) == (1, {"record-digest"})
    assert [e["offset"] for e in errors] == offsets


def test_validate_says_so_when_all_is_well(cli: CommandLine, tiny_file: Make) -> None:
    path = tiny_file()
    assert cli("validate", path, "--deep").success().out == f"{path}: valid (deep)\n"
    report = json.loads(cli("validate", path, "--json").success().out)
    assert report == {"path": str(path), "deep": False, "ok": True, "complete": True, "errors": []}


def test_inspect_agrees_with_the_file_and_its_source(tiny: Path, cli: CommandLine, tiny_file: Make) -> None:
    path = tiny_file()
    data = path.read_bytes()
    facts = json.loads(cli("inspect", path, "--json").success().out)
    assert facts["size"] == len(data)
    assert facts["head_size"] == int.from_bytes(data[72:80], "little")
    assert facts["file_id"] == hashlib.sha256(data[: facts["head_size"]]).hexdigest()
    assert facts["parameters"] == sum(int(p.stat().st_size) for p in tiny.glob("*.safetensors")) // 2 - sum(
        (8 + int.from_bytes(p.read_bytes()[:8], "little")) // 2 for p in tiny.glob("*.safetensors")
    )
    config = json.loads((tiny / "config.json").read_text())
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    assert facts["experts"] == {
        "layers": layers,
        "records": layers * experts,
        "encodings": "affine 4-bit g64 (bf16)",
    }
    weights = layers * experts * 3 * config["hidden_size"] * config["moe_intermediate_size"]
    assert facts["roles"]["expert"] == {
        "parameters": weights,
        "stored_bytes": weights * 9 // 16,
        "bits_per_weight": 4.5,
    }
    assert facts["roles"]["router"]["bits_per_weight"] == 8.5
    assert facts["bits_per_weight"] == pytest.approx(
        sum(r["stored_bytes"] for r in facts["roles"].values()) * 8 / facts["parameters"]
    )
    for section in facts["sections"]:
        assert 0 < section["offset"] < section["offset"] + section["stored_size"] <= len(data)
    text = cli("inspect", path).success().out
    assert f"{facts['bits_per_weight']:.3f} bits per weight" in text.splitlines()[0]
    assert facts["file_id"] in text


# run


def test_run_prints_the_answer_and_a_line_of_statistics(tiny: Path, cli: CommandLine, tiny_file: Make) -> None:
    file = tiny_file()
    outcome = cli("run", file, "--no-chat", "--resident", "25%", "-n", "12", "-p", PROMPT).success()
    assert outcome.out == squizd.generate(file, PROMPT, max_tokens=12, resident=1.0) + "\n"
    found = STATISTICS.fullmatch(outcome.err)
    assert found, outcome.err
    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(PROMPT).ids
    assert (int(found[1]), int(found[2])) == (len(ids), 12)
    assert 0 < float(found[3]) < 100
    assert cli("run", file, "--no-chat", "--quiet", "-n", "12", "-p", PROMPT).success() == Outcome(0, outcome.out, "")


def test_run_uses_the_chat_template_unless_told_not_to(tiny: Path, cli: CommandLine, tiny_file: Make) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for options, text in (
        ([], f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"),
        (["--chat"], f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"),
        (
            ["--system", "Be short."],
            f"<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (["--no-chat"], PROMPT),
    ):
        outcome = cli("run", tiny_file(), *options, "-n", "2", "-p", PROMPT).success()
        expected = squizd.generate(tiny_file(), tokenizer.encode(text).ids, max_tokens=2)
        assert outcome.out == expected + "\n", options
        assert int(outcome.err.split()[0]) == len(tokenizer.encode(text).ids), options


def test_run_reads_the_prompt_from_standard_input(cli: CommandLine, tiny_file: Make) -> None:
    expected = answer(cli, tiny_file(), "-p", PROMPT)
    assert answer(cli, tiny_file(), stdin=PROMPT) == expected
    assert answer(cli, tiny_file(), "-p", "-", stdin=PROMPT) == expected
    assert answer(cli, tiny_file(), "-p", "Näher an Ω", stdin=b"ignored") == answer(
        cli, tiny_file(), stdin="Näher an Ω".encode()
    )


@pytest.mark.parametrize(
    ("options", "text", "says"),
    [
        ([], b"", "the prompt is empty"),
        ([], b"caf\xe9 in Latin-1", "standard input is not UTF-8 text at byte 3"),
        (["-p", "caf\udce9"], b"", "the prompt is not UTF-8 text"),  # as Python passes an unreadable argument
        (["-p", "x", "--system", "caf\udce9"], b"", "the prompt is not UTF-8 text"),
    ],
)
def test_run_refuses_an_empty_or_unreadable_prompt(
    options: list[str], text: bytes, says: str, cli: CommandLine, tiny_file: Make
) -> None:
    assert says in cli("run", tiny_file(), "--no-chat", *options, stdin=text).failure()


def test_a_seed_makes_draws_repeatable(cli: CommandLine, tiny_file: Make) -> None:
    draws = [answer(cli, tiny_file(), "-p", PROMPT, "--temp", "1.5", "--seed", seed) for seed in ("7", "7", "8", "9")]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    greedy = answer(cli, tiny_file(), "-p", PROMPT)
    assert greedy == answer(cli, tiny_file(), "-p", PROMPT, "--temp", "1.5", "--top-k", "1", "--seed", "7")


def test_too_small_a_budget_names_one_that_works(cli: CommandLine, tiny_file: Make) -> None:
    message = cli("run", tiny_file(), "--no-chat", "-n", "4", "-p", PROMPT, "--memory", "100kB").failure()
    found = re.search(r"at least ([\d.,]+) MB are needed", message)
    assert found
    minimum = int(found[1].replace(",", ""))
    assert answer(cli, tiny_file(), "-p", PROMPT, "--memory", f"{minimum}MB") == answer(cli, tiny_file(), "-p", PROMPT)
    cli("run", tiny_file(), "-p", PROMPT, "--memory", f"{minimum - 1}MB").failure()


@pytest.mark.parametrize(
    "options",
    [
        ["--memory", "much"],
        ["--resident", "most"],
        ["--resident", "120%"],
        ["--context", "4"],
        ["-n", "90", "--context", "90"],
    ],
)
def test_budgets_that_make_no_sense(options: list[str], cli: CommandLine, tiny_file: Make) -> None:
    cli("run", tiny_file(), "-p", PROMPT, *options).failure()


def test_run_streams_and_ctrl_c_stops_it(cli: CommandLine, tiny_file: Make) -> None:
    process = cli.start("run", tiny_file(), "--no-chat", "-p", PROMPT, "-n", "3000", "--context", "4000")
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    first = os.read(process.stdout.fileno(), 100)
    assert process.poll() is None  # text came before the answer was complete
    process.send_signal(signal.SIGINT)
    outcome = cli.finish(process)
    assert (outcome.code, outcome.err) == (130, "squizd: interrupted\n")
    assert first


def test_a_reader_that_goes_away_is_no_error_message(cli: CommandLine, tiny_file: Make) -> None:
    process = cli.start("run", tiny_file(), "--no-chat", "-p", PROMPT, "-n", "3000", "--context", "4000")
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    process.stdout = None
    outcome = cli.finish(process)
    assert (outcome.code, outcome.err) == (1, "")


# Chat


class Terminal:
    """`squizd run FILE` on a terminal of its own; lines must be shorter than its 80 columns."""

    def __init__(self, cli: CommandLine, *args: str | Path) -> None:
        self.master, slave = pty.openpty()
        env = cli.environment(TERM="dumb")
        self.process = cli.start("run", *args, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def until(self, mark: str, timeout: float = 60) -> str:
        """What is shown until it ends in `mark`, without the terminal's carriage returns."""
        shown, end = "", time.monotonic() + timeout
        while not shown.endswith(mark):
            assert select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0], shown
            shown += os.read(self.master, 1 if mark != "> " else 1000).decode().replace("\r", "")
        return shown

    def say(self, line: str) -> str:
        """Type a line; returns what is shown between its echo and the next prompt."""
        os.write(self.master, line.encode() + b"\n")
        self.until(line + "\n")
        return self.until("> ").removesuffix("> ")

    def end(self, typed: bytes) -> int:
        """Type what ends the chat; returns the exit code."""
        os.write(self.master, typed)
        try:
            while os.read(self.master, 1000):
                pass
        except OSError:  # Linux says so when the other side has closed
            pass
        return self.process.wait(timeout=60)


def test_a_chat_remembers_until_new_and_ends_on_exit(cli: CommandLine, tiny_file: Make) -> None:
    with Terminal(cli, tiny_file(), "-n", "8", "--resident", "50%", "--context", "80") as terminal:
        assert "/new starts over" in terminal.until("> ")
        turns = [terminal.say("Hello there") for _ in range(2)]
        assert terminal.say("/new") == ""
        turns.append(terminal.say("Hello there"))
        assert terminal.say("") == ""
        full = terminal.say("~!@#$%^&*()_+" * 5)
        assert re.fullmatch(r"squizd: the conversation has reached \d+ tokens.*\nhint: start a new .*\n", full)
        assert terminal.end(b"/exit\n") == 0
    answers, statistics = zip(*(turn.rstrip("\n").rsplit("\n", 1) for turn in turns), strict=True)
    assert all(STATISTICS.fullmatch(line + "\n") for line in statistics)
    assert answers[2] == answers[0]
    assert statistics[2].split(" tokens")[0] == statistics[0].split(" tokens")[0]
    with squizd.Session(tiny_file(), resident=1.0) as session:
        conversation = squizd.Conversation()
        for shown in answers[:2]:
            parts = list(session.reply(conversation, "Hello there", max_tokens=8))
            assert "".join(part.text for part in parts) == shown


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(cli: CommandLine, tiny_file: Make) -> None:
    options = ["-n", "3000", "--context", "4000", "--no-chat"]
    with Terminal(cli, tiny_file(), *options) as terminal:
        terminal.until("> ")
        os.write(terminal.master, b"Hello\n")
        terminal.until("Hello\n")
        assert os.read(terminal.master, 1)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.until("> ").endswith(" (stopped)\n> ")
        assert terminal.end(b"\x04") == 0


# Without MLX

_BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "huggingface_hub", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def without_mlx(code: str, *args: str | Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + code, *map(str, args)],
        capture_output=True,
        text=True,
        env=CommandLine.environment(),
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_container_needs_no_mlx(tiny_file: Make) -> None:
    code = """
import squizd, squizd.container
assert squizd.validate(sys.argv[1], deep=True).ok
with squizd.open(sys.argv[1]) as f:
    print(f.array("model.norm.weight").shape, f.expert_arrays(0, 0)["up_proj.weight"].dtype)
"""
    assert without_mlx(code, tiny_file()).success().out == "(128,) float32\n"


def test_without_mlx_what_needs_none_works_and_the_rest_says_what_to_install(tiny: Path, tiny_file: Make) -> None:
    code = "from squizd.cli import main; main()"
    without_mlx(code, "validate", "--deep", tiny_file()).success()
    without_mlx(code, "inspect", tiny_file()).success()
    for command in (["run", tiny_file(), "-p", "x"], ["compress", tiny, "-o", "/dev/null/x"]):
        message = without_mlx(code, *command).failure()
        assert message.splitlines()[0].endswith("is installed without a backend for this machine")
        assert 'pip install "squizd[cpu]"' in message
    code = "import squizd\ntry: squizd.load\nexcept squizd.SquizdError as e: print(type(e).__name__)"
    assert without_mlx(code).success().out == "BackendError\n"


def test_help_has_an_example_for_every_command(cli: CommandLine) -> None:
    from squizd.cli import main

    assert all(re.search(r"Example:\s+squizd " + name, cli(name, "--help").success().out) for name in main.commands)
    assert cli("--version").success().out == f"squizd, version {squizd.__version__}\n"
    assert shutil.which("squizd") is None or (cli("nothing").code, cli("run").code) == (2, 2)
