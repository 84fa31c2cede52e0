"""Text from a loaded file, against mlx-lm's own generation on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model

import squizd
from squizd import kernels
from squizd.errors import ContextError, RequestError
from squizd.generation import Conversation, Sampling, render_chat
from squizd.kernels import layers
from squizd.runtime.device import accelerate

PROMPT = "The city was founded in the year"


@pytest.fixture(scope="module")
def file(tiny_file: Any) -> str:
    return str(tiny_file(recipe="int4", quantizer="minmax"))


@pytest.fixture(scope="module")
def mlx_reference(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Any:
    """mlx-lm's own 4-bit conversion of the same checkpoint, in float32."""
    folder = tmp_path_factory.mktemp("mlx") / "model"
    mlx_lm.convert(hf_path=str(tiny), mlx_path=str(folder), quantize=True)
    model, tokenizer = mlx_lm.load(str(folder))
    widen = lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
    model.update(tree_map(widen, model.parameters()))
    accelerate(model)  # its own graph, on the same kernels: bits can be compared, with SQUIZD_KERNELS=0 mlx-lm's own
    return model, tokenizer


def test_logits_are_mlx_lms_own(file: str, mlx_reference: Any) -> None:
    """Bit for bit through MLX; with squizd's kernels up to the order in which sums are added."""
    model, tokenizer = mlx_reference[0], mlx_reference[1]
    ids = mx.array([tokenizer.encode(PROMPT * 5)])
    with layers.switched_off():
        wanted = np.array(model(ids))
    found = np.array(squizd.load(file, resident="25%")[0](ids))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0 if kernels.missing() else 1e-5 * np.abs(wanted).max())


def test_text_equals_mlx_lm_at_any_residency(file: str, mlx_reference: Any) -> None:
    model, tokenizer = mlx_reference
    wanted = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=40)
    assert len(wanted) > 20
    for resident in ("100%", "25%", "0%"):
        with squizd.Session(file, resident=resident) as session:
            assert session.generate(PROMPT, max_tokens=40) == wanted
            assert (session.stats.misses > 0) == (resident != "100%")
    assert squizd.generate(file, PROMPT, max_tokens=40, resident="50%") == wanted


def test_loaded_model_is_an_mlx_lm_model(file: str, mlx_reference: Any) -> None:
    """generate_step and make_prompt_cache work on it, token for token."""
    reference, tokenizer = mlx_reference
    model, _ = squizd.load(file, resident="25%")
    ids = mx.array(tokenizer.encode(PROMPT))
    sides = []
    for m in (reference, model):
        cache = make_prompt_cache(m)
        sides.append([(token, np.array(p)) for token, p in generate_step(ids, m, max_tokens=12, prompt_cache=cache)])
    for (token_a, p_a), (token_b, p_b) in zip(*sides, strict=True):
        assert token_a == token_b
        np.testing.assert_array_equal(p_a, p_b)


def test_parts_join_to_the_text_and_count_tokens(file: str) -> None:
    model, tokenizer = squizd.load(file)
    parts = list(squizd.stream_generate(model, tokenizer, PROMPT, max_tokens=16))
    assert "".join(p.text for p in parts) == squizd.generate(file, PROMPT, max_tokens=16)
    assert parts[-1].finish_reason == "length"
    assert [p.finish_reason for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].generated_tokens == 16
    assert parts[0].prompt_tokens == len(tokenizer.encode(PROMPT))


def test_seed_repeats_and_sampling_differs(file: str) -> None:
    with squizd.Session(file) as session:
        drawn = [session.generate(PROMPT, max_tokens=24, sampling=Sampling(1.0, seed=s)) for s in (1, 1, 2)]
        greedy = session.generate(PROMPT, max_tokens=24)
        only_top = session.generate(PROMPT, max_tokens=24, sampling=Sampling(1.0, top_k=1, seed=3))
    assert drawn[0] == drawn[1] != drawn[2]
    assert only_top == greedy != drawn[0]


def test_conversation_with_a_kept_cache_equals_one_computed_afresh(file: str) -> None:
    messages = ["Tell me about the river.", "And the war?", "Why?"]
    with squizd.Session(file, resident="25%", context=1024) as session:
        kept = Conversation(system="Answer briefly.")
        for message in messages:
            history = list(kept.messages)
            before = session.state.stats
            answer = "".join(p.text for p in session.reply(kept, message, max_tokens=12))
            computed = session.timing.prompt_tokens
            ids = render_chat(session.tokenizer, [*history, {"role": "user", "content": message}])
            assert answer == session.generate(ids, max_tokens=12)
            assert kept.messages[-1] == {"role": "assistant", "content": answer}
            assert session.state.stats.hits > before.hits
            if history[1:]:
                assert computed < len(ids) / 2, "the cache was not reused"


def test_abandoned_answer_leaves_the_conversation_as_it_was(file: str) -> None:
    with squizd.Session(file) as session:
        conversation = Conversation()
        list(session.reply(conversation, "One.", max_tokens=4))
        before = list(conversation.messages)
        stream = session.reply(conversation, "Two.", max_tokens=50)
        next(stream)
        stream.close()
        assert conversation.messages == before
        fresh = Conversation(messages=list(before))
        one, two = ("".join(p.text for p in session.reply(c, "Three.", max_tokens=8)) for c in (conversation, fresh))
        assert one == two


def test_context_is_checked_before_the_first_token(file: str) -> None:
    with squizd.Session(file, context=32) as session:
        with pytest.raises(ContextError, match="reserved context of 32"):
            session.generate(PROMPT, max_tokens=100)
        assert session.generate(PROMPT, max_tokens=8)
        conversation = Conversation()
        with pytest.raises(ContextError):
            for i in range(9):
                list(session.reply(conversation, f"Message {i}", max_tokens=5))


@pytest.mark.parametrize(
    ("prompt", "reason"), [("", "empty"), ([], "empty"), ([10**6], "vocabulary"), ([-1], "vocabulary")]
)
def test_bad_prompts_are_refused(file: str, prompt: Any, reason: str) -> None:
    with squizd.Session(file) as session, pytest.raises(RequestError, match=reason):
        session.generate(prompt)


def test_weights_read_back_are_those_that_were_quantized(file: str, mlx_reference: Any) -> None:
    """`File.array` and `expert_arrays` (NumPy) against mlx-lm's dequantized model."""
    model = dequantize_model(mlx_reference[0])
    with squizd.open(file) as f:
        for name, module in (
            ("model.embed_tokens.weight", model.model.embed_tokens),
            ("model.layers.1.self_attn.q_proj.weight", model.layers[1].self_attn.q_proj),
        ):
            np.testing.assert_allclose(f.array(name), np.array(module.weight), rtol=1e-6, atol=1e-7)
        expert = f.expert_arrays(2, 5)
        switch = model.layers[2].mlp.switch_mlp
        for projection in ("gate_proj", "up_proj", "down_proj"):
            wanted = np.array(switch[projection].weight[5])
            np.testing.assert_allclose(expert[f"{projection}.weight"], wanted, rtol=1e-6, atol=1e-7)
