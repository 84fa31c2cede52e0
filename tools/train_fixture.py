"""Train the tiny Qwen3-MoE checkpoint that the tests run against (`fixtures/tiny-moe`).

Reads rows of `{"domain", "text"}` (JSONL, plain or .xz), trains a byte-level BPE tokenizer and a 3.6 M parameter
model from scratch on one CPU core, and writes a checkpoint in the layout of the published Qwen3-MoE models: BF16,
two shards with an index, one tensor per expert and projection. Beside it go `reference_logits.npz`, transformers'
own float32 logits for three fixed prompts, and `evaluation.json`, what was measured on the written checkpoint.

Knows nothing of squizd. Development only; needs torch, transformers >= 5, tokenizers, numpy and tqdm.
The same text, options, library versions and thread count give the same weights on the same kind of machine.
"""

import argparse
import json
import lzma
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm, trange
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZE_LIMIT = 8 * 1024 * 1024  # bytes of safetensors; the checkpoint lives in git
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {  # the key names of published checkpoints; every matrix dimension is a multiple of 64
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.01,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
COMMON_WORDS = frozenset(
    (
        "the", "of", "and", "to", "in", "a", "is", "that", "it", "for",
        "was", "on", "with", "as", "his", "he", "be", "at", "by", "this",
    )
)  # fmt: skip
PROMPTS = [  # written for this file, so no model has seen them; cut to the token count beside each
    ("The old man walked slowly along the river, and when he came to the bridge he", 12),
    (
        "When the rain stopped, the children ran out of the house to see the garden. The grass was wet, the sky was "
        "bright, and far away, behind the hills, they could hear the sound of a train that was late again.",
        40,
    ),
    (
        "The film begins in a small town near the sea, where a young woman comes home after many years to sell her "
        "father's house. Nobody in the town wants her to go, and nobody will say why. There is a doctor who knows more "
        "than he tells, a policeman who is never at work, and a boy who draws the same door every day. For an hour it "
        "is a very good story about people who have waited too long. Then the door opens, and the picture becomes "
        "something else: louder, faster, and not nearly as interesting as the first part of it.",
        100,
    ),
]


def read_texts(path: Path, domains: set[str], min_english: float) -> tuple[list[str], list[str]]:
    """Return (training, held-out) texts of `domains`; every 40th kept row is held out.

    A row is kept if at least `min_english` of its words are among twenty common English ones.
    """
    opener = lzma.open if path.suffix == ".xz" else open
    kept: list[str] = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            words = re.findall(r"\w+", row["text"].lower())
            if row["domain"] in domains and sum(w in COMMON_WORDS for w in words) >= min_english * max(len(words), 1):
                kept.append(row["text"].strip())
    if len(kept) < 80:
        raise SystemExit(f"{path.name}: only {len(kept)} rows of {sorted(domains)} left, at least 80 needed")
    return [t for i, t in enumerate(kept) if i % 40], kept[::40]


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with Qwen's splitting rule, write it to `out` and load it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    bpe.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[0],
            "pad_token": SPECIAL_TOKENS[0],
            "additional_special_tokens": SPECIAL_TOKENS[1:],
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return AutoTokenizer.from_pretrained(out)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, chat_every: int = 0) -> torch.Tensor:
    """Return all texts as one int64 vector of tokens, `<|endoftext|>` before each.

    Every `chat_every`-th text becomes a conversation whose turns are its lines, so that the chat tokens are trained.
    """
    tokens: list[int] = []
    for i, text in enumerate(tqdm(texts, desc="tokenize", unit="text")):
        if chat_every and i % chat_every == 0:
            lines = [line.strip() for line in text.splitlines() if 0 < len(line.strip()) < 500]
            turns = [{"role": ("user", "assistant")[n % 2], "content": line} for n, line in enumerate(lines)]
            text = tokenizer.apply_chat_template(turns, tokenize=False) if turns else text
        tokens += [0, *tokenizer(text)["input_ids"]]
    return torch.tensor(tokens)


def train(tokens: torch.Tensor, args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """Train from random weights with AdamW, warm-up and cosine decay."""
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG, use_cache=False, output_router_logits=True))
    model.set_experts_implementation("grouped_mm")  # the fastest of transformers' expert loops on a CPU
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, args.steps // 40)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    for step in (bar := trange(args.steps, desc="train", unit="step")):
        begins = torch.randint(len(tokens) - args.seq_len, (args.batch, 1))
        batch = tokens[begins + torch.arange(args.seq_len)]
        loss = model(input_ids=batch, labels=batch).loss  # cross entropy + router_aux_loss_coef * balancing loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def write_checkpoint(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Write BF16 shards, index and configs to `out`; fail if the shards exceed `SIZE_LIMIT`."""
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="4MB")  # splits the fused experts again
    write_json(out / "config.json", CONFIG)  # instead of transformers' own, whose newer key names fewer readers know
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0})
    shards = sorted(out.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    if len(shards) < 2 or size > SIZE_LIMIT:
        raise SystemExit(f"{out}: {len(shards)} shards, {size} bytes; wanted at least 2, at most {SIZE_LIMIT} bytes")
    for shard in shards:
        shard.chmod(0o644)


def load_reference(folder: Path) -> Qwen3MoeForCausalLM:
    """Load a written checkpoint the plainest way: float32, eager attention, eager experts."""
    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def write_reference(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write `ids_i` (int64 [length]) and `logits_i` (float32 [4, vocab], the last four positions) per prompt."""
    arrays: dict[str, np.ndarray] = {}
    for i, (text, length) in enumerate(PROMPTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
        if ids.shape[1] != length:
            raise SystemExit(f"prompt {i} has {ids.shape[1]} tokens, {length} needed")
        arrays[f"ids_{i}"] = ids[0].numpy()
        arrays[f"logits_{i}"] = model(input_ids=ids).logits[0, -4:].numpy()
    np.savez(out / "reference_logits.npz", **arrays)


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, seq_len: int) -> dict[str, Any]:
    """Return loss (nats per token) and perplexity over windows of `tokens`, and per layer the range of expert use."""
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)[:256]
    losses: list[torch.Tensor] = []
    counts = torch.zeros(CONFIG["num_hidden_layers"], CONFIG["num_experts"])
    for batch in tqdm(windows.split(8), desc="evaluate", unit="batch"):
        result = model(input_ids=batch, output_router_logits=True)
        losses.append(cross_entropy(result.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
        for layer, router_logits in enumerate(result.router_logits):
            chosen = router_logits.topk(CONFIG["num_experts_per_tok"]).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=CONFIG["num_experts"])
    loss = torch.cat(losses).mean().item()
    shares = counts / counts.sum(dim=1, keepdim=True)
    return {
        "held_out_tokens": windows.numel(),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "expert_share_min_max": [[round(s.min().item(), 5), round(s.max().item(), 5)] for s in shares],
    }


@torch.no_grad()
def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int | None) -> str:
    """Continue the first prompt by 60 tokens, greedily if `seed` is None."""
    ids = tokenizer(PROMPTS[0][0], return_tensors="pt")["input_ids"]
    choice = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    torch.manual_seed(seed or 0)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, **choice)
    return str(tokenizer.decode(tokens[0]))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: python tools/train_fixture.py --text train.jsonl.xz --steps 200 --out /tmp/quick",
    )
    parser.add_argument("--text", type=Path, help='training text, rows of {"domain", "text"}: .jsonl or .jsonl.xz')
    parser.add_argument("--out", type=Path, default=Path("fixtures/tiny-moe"), help="folder to write")
    parser.add_argument("--domains", default="prose", help="comma-separated domains to train on")
    parser.add_argument("--min-english", type=float, default=0.2, help="least share of common English words in a row")
    parser.add_argument("--steps", type=int, default=6500, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--reference-only", action="store_true", help="only rewrite reference_logits.npz of --out")
    args = parser.parse_args()
    if not args.text and not args.reference_only:
        parser.error("--text is needed to train")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.reference_only:
        write_reference(load_reference(args.out), AutoTokenizer.from_pretrained(args.out), args.out)
        return
    partial, old = (args.out.with_name(args.out.name + suffix) for suffix in (".partial", ".old"))
    partial.mkdir(parents=True)
    texts, held_out = read_texts(args.text, set(args.domains.split(",")), args.min_english)
    tokenizer = train_tokenizer(texts, partial)
    write_checkpoint(train(encode(texts, tokenizer, chat_every=8), args), partial)
    model = load_reference(partial)  # from here on: what was written, not what was trained
    write_reference(model, tokenizer, partial)
    evaluation = {
        "parameters": model.num_parameters(),
        "training_tokens": args.steps * args.batch * args.seq_len,
        **evaluate(model, encode(held_out, tokenizer), args.seq_len),
        "greedy": sample(model, tokenizer, None),
        "sampled": sample(model, tokenizer, 1),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
    }
    write_json(partial / "evaluation.json", evaluation)
    print(json.dumps(evaluation, indent=2))
    if args.out.exists():  # readers see the old checkpoint until the new one is whole
        if (args.out / "README.md").exists():
            shutil.copy(args.out / "README.md", partial)
        args.out.rename(old)
    partial.rename(args.out)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
