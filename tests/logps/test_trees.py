"""A prompt that several sequences share is computed once, and every log-prob, score and gradient stays that of the whole row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from halos.data.collate import pack
from halos.examples import Completion, PackRow
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import LanguageModel, RewardModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 90, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0},
    "GptOss": {"head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
}


def config_of(name: str) -> PretrainedConfig:
    return getattr(transformers, f"{name}Config")(**SIZES, **KINDS[name], num_labels=1)


def model_of(auto: Any, name: str, attention: str) -> PreTrainedModel:
    register()
    torch.manual_seed(0)
    model = auto.from_config(config_of(name), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def rows_of(prompts: Sequence[int], seed: int = 0, *, vocabulary: int = 90) -> list[PackRow]:
    """A row for each prompt number, with a random completion of which some tokens are scored; equal numbers are one prompt."""
    random = np.random.default_rng(seed)
    texts = {number: random.integers(3, vocabulary, random.integers(1, 14)) for number in sorted({*prompts})}
    rows = list[PackRow]()
    for number in prompts:
        length = int(random.integers(1, 12))
        scored = random.random(length) < 0.7
        scored[-1] = True
        rows.append((texts[number].astype(np.int32), Completion(random.integers(3, vocabulary, length).astype(np.int32), scored)))
    return rows


def whole(row: PackRow) -> Tensor:
    return torch.from_numpy(np.concatenate([row[0], row[1].ids]).astype(np.int64))


def naive_logps(model: Any, rows: Sequence[PackRow]) -> list[Tensor]:
    """Log-probs of the scored tokens from each row's full logits by transformers' own forward."""
    result = []
    for prompt, completion in rows:
        ids = whole((prompt, completion))
        logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        scored = len(prompt) + np.flatnonzero(completion.scored)
        result.append(logps[scored - 1, ids[scored]])
    return result


@given(prompts=st.lists(st.integers(0, 3), min_size=1, max_size=7), seed=st.integers(0, 2**20), share=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_tree_holds_every_token_of_its_rows_and_each_prompt_once(prompts: list[int], seed: int, share: bool) -> None:
    rows = rows_of(prompts, seed, vocabulary=2**20)
    batch = pack(rows, share=share)
    assert len(batch.ids) == sum(map(sum, batch.trees)) == len(batch.positions)
    assert sorted(batch.leaves) == [*range(len(rows))]
    if share:
        assert len(batch.trees) == len({*prompts}), "rows of one prompt are one tree"
    start, leaves = 0, iter(batch.leaves)
    scored = set()
    for trunk, *branches in batch.trees:
        end = start + trunk
        for branch in branches or [0]:
            own = [*range(start, start + trunk), *range(end, end + branch)]
            number = next(leaves)
            assert batch.ids[own].tolist() == whole(rows[number]).tolist()
            assert batch.positions[own].tolist() == [*range(len(own))]
            mask = [False] * len(rows[number][0]) + rows[number][1].scored.tolist()
            scored |= {(number, own[n - 1], int(batch.ids[own[n]])) for n in range(1, len(own)) if mask[n]}
            end += branch
        start = end
    given_ = [*zip(batch.rows.tolist(), batch.sources.tolist(), batch.targets.tolist(), strict=True)]
    assert {*given_} == scored
    assert len(given_) == len(scored)
    for number in range(len(rows)):
        assert batch.columns[batch.rows == number].tolist() == [*range(int(rows[number][1].scored.sum()))], "in their order"


@pytest.mark.parametrize("name", KINDS)
def test_log_probs_and_gradients_are_those_of_whole_rows(name: str) -> None:
    trees, plain = model_of(AutoModelForCausalLM, name, SEGMENTS), model_of(AutoModelForCausalLM, name, "eager")
    module = LanguageModel(trees)
    assert module.plan.shares
    for seed in range(3):
        rows = rows_of([0, 1, 0, 2, 1, 0], seed)
        logps = module(pack(rows, share=True))
        naive = naive_logps(plain, rows)
        for row, expected in enumerate(naive):
            assert torch.allclose(logps.values[row][logps.mask[row]], expected, atol=1e-6, rtol=1e-6)
        weights = torch.linspace(-1, 1, len(rows))
        (torch.tanh(logps.sum / 50) * weights).sum().backward()
        (torch.tanh(torch.stack([each.sum() for each in naive]) / 50) * weights).sum().backward()
        for (label, mine), theirs in zip(trees.named_parameters(), plain.parameters(), strict=True):
            if theirs.grad is None or not theirs.grad.norm():
                continue
            assert mine.grad is not None
            assert ((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 5e-6, label
        trees.zero_grad(), plain.zero_grad()


@pytest.mark.parametrize("name", KINDS)
def test_another_branch_changes_not_one_bit_of_a_branch(name: str) -> None:
    module = LanguageModel(model_of(AutoModelForCausalLM, name, SEGMENTS))
    rows = rows_of([0, 1, 0, 0])
    before = module(pack(rows, share=True)).values[[0, 1, 3]]
    rows[2] = rows[2][0], Completion((rows[2][1].ids + 1) % 80 + 3, rows[2][1].scored)
    assert torch.equal(module(pack(rows, share=True)).values[[0, 1, 3]], before)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_scores_are_those_of_whole_rows_also_where_an_answer_is_padding(name: str) -> None:
    trees = model_of(AutoModelForSequenceClassification, name, SEGMENTS)
    plain: Any = model_of(AutoModelForSequenceClassification, name, "eager")
    rows = rows_of([0, 1, 0, 0, 1, 2])
    rows[2][1].ids[-1:] = 0
    rows[4][1].ids[:] = 0  # an answer of padding alone is scored at the prompt's end
    scores = RewardModel(trees)(pack(rows, share=True))
    expected = torch.cat([plain(input_ids=whole(row)[None]).logits[:, 0] for row in rows])
    assert torch.allclose(scores, expected, atol=1e-6)
    assert RewardModel(trees).plan.shares


def test_a_branch_without_tokens_and_rows_without_a_prompt() -> None:
    module = LanguageModel(model_of(AutoModelForCausalLM, "Llama", SEGMENTS))
    rows = rows_of([0, 0, 1, 1])
    rows[1] = rows[1][0], Completion(np.zeros(0, np.int32), np.zeros(0, bool))
    for n in (2, 3):
        rows[n] = np.zeros(0, np.int32), rows[n][1]
    batch = pack(rows, share=True)
    assert len(batch.trees) == 3, "rows without a prompt share nothing"
    together, alone = module(batch), [module(pack([row])) for row in (rows[0], rows[2], rows[3])]
    assert not together.mask[1].any()
    for row, one in zip((0, 2, 3), alone, strict=True):
        assert torch.allclose(together.sum[row], one.sum[0], atol=1e-6)


def test_a_long_completion_of_a_short_prompt_is_not_worth_a_tree() -> None:
    def row(prompt: int, completion: int) -> PackRow:
        return np.ones(prompt, np.int32), Completion(np.full(completion, 5, np.int32), np.ones(completion, bool))

    assert pack([row(4, 128), row(4, 128)], share=True).trees == ((4, 128, 128),)
    assert pack([row(4, 129), row(4, 128), row(4, 10)], share=True).trees == ((133,), (4, 128, 10))
