"""The default engine: the same request gives the same text, and its log-probs are the policy's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos.config.defaults import section
from halos.config.schema import Sampler
from halos.data import arithmetic
from halos.data.collate import pack
from halos.data.tokenize import Encoder
from halos.examples import Completion as Tokens
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import LanguageModel
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.rollout.engines.hf import HFEngine
from halos.rollout.prompts import fitting
from halos.rollout.types import Origin, Prompt, Request, Sample, requests_for
from tests.mixtures import build

PROMPTS = [Prompt(str(n), tuple(row["prompt"])) for n, row in zip(range(6), arithmetic.rows("eval"), strict=False)]


@pytest.fixture(scope="module")
def policy(cache: Path) -> tuple[PreTrainedModel, Any]:
    place = locate("tiny", None, cache)
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    return load_model(place, tokenizer, reward=False, dtype=torch.float32, attention="sdpa"), tokenizer


def asked(tokenizer: Any, *, samples: int = 3, temperature: float = 1.0, seed: int = 0, tokens: int = 10) -> list[Request]:
    encoder = Encoder(tokenizer, max_length=512, truncation="drop")
    return requests_for(
        fitting(PROMPTS, encoder, 512), samples=samples, temperature=temperature, max_new_tokens=tokens, seed=seed
    )


def sampled(
    policy: tuple[PreTrainedModel, Any], requests: list[Request], *, batch_size: int = 32, cache_tokens: int = 4096,
    top_p: float = 1.0, top_k: int = 0,
) -> dict[Any, Sample]:  # fmt: skip
    settings = section(Sampler, batch_size=batch_size, cache_tokens=cache_tokens, top_p=top_p, top_k=top_k)
    return {sample.key: sample for sample in HFEngine(*policy, settings, Origin("policy")).sample(requests)}


def texts(found: dict[Any, Sample]) -> dict[Any, tuple[int, ...]]:
    return {key: sample.ids for key, sample in found.items()}


def test_the_same_request_gives_the_same_text_in_any_batch(policy: tuple[PreTrainedModel, Any]) -> None:
    requests = asked(policy[1])
    whole = sampled(policy, requests)
    assert sampled(policy, requests) == whole, "to the bit, where the list is the same"
    assert len(set(texts(whole).values())) == len(requests)
    few = sampled(policy, requests[7:9])
    assert texts(few) == {key: ids for key, ids in texts(whole).items() if key in few}
    assert texts(sampled(policy, requests, batch_size=4, cache_tokens=64)) == texts(whole), "a full cache costs only time"
    assert texts(sampled(policy, asked(policy[1], seed=1))) != texts(whole)


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_cache_of_what_the_requests_take_gives_the_samples_of_a_larger_one(
    batch_size: int, policy: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, pages, chosen = asked(policy[1], tokens=40), list[int](), HFEngine._batching

    def counted(engine: HFEngine, given: Any, least: int = 0) -> Any:
        config = chosen(engine, given)
        config.num_blocks = max(config.num_blocks, least)
        pages.append(config.num_blocks)
        return config

    monkeypatch.setattr(HFEngine, "_batching", counted)
    own = sampled(policy, requests, batch_size=batch_size, cache_tokens=65536)
    monkeypatch.setattr(HFEngine, "_batching", lambda engine, given: counted(engine, given, 2048))
    assert sampled(policy, requests, batch_size=batch_size, cache_tokens=65536) == own, "log-probs to the bit"
    assert pages[0] < 200 < pages[1] == 2048


def test_log_probs_are_the_policys_own(policy: tuple[PreTrainedModel, Any]) -> None:
    for temperature in (1.0, 0.7):
        requests = asked(policy[1], temperature=temperature)
        found = sampled(policy, requests)
        rows = [
            (np.array(request.ids), Tokens(ids := np.array(found[request.key].ids), np.ones(len(ids), bool)))
            for request in requests
        ]
        register()
        policy[0].set_attn_implementation(SEGMENTS)
        with torch.no_grad():
            logps = LanguageModel(policy[0], temperature=temperature)(pack(rows))
        policy[0].set_attn_implementation("sdpa")
        for row, request in enumerate(requests):
            own = found[request.key].logps
            np.testing.assert_allclose(logps.values[row, : len(own)].numpy(), own, atol=1e-4)


def test_the_model_is_as_it_was_afterwards(policy: tuple[PreTrainedModel, Any]) -> None:
    model = policy[0]
    register()
    model.set_attn_implementation(SEGMENTS)
    model.train()
    sampled(policy, asked(policy[1])[:2])
    assert (model.training, model.config._attn_implementation) == (True, SEGMENTS)
    model.eval().set_attn_implementation("sdpa")


def test_a_mixture_that_returns_its_routers_logits_is_sampled_without_them(
    policy: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    tokenizer = policy[1]
    place = build("Mixtral", tmp_path / "mixture")
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    requests = asked(tokenizer, tokens=3)[:2]
    expected = texts(sampled((model, tokenizer), requests))
    model.config.output_router_logits = True
    assert texts(sampled((model, tokenizer), requests)) == expected
    assert model.config.output_router_logits


def test_zero_temperature_and_one_token_of_the_top_are_greedy(policy: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = policy
    greedy = texts(sampled(policy, asked(tokenizer, samples=1, temperature=0.0)))
    assert texts(sampled(policy, asked(tokenizer, samples=1), top_k=1)) == greedy
    assert texts(sampled(policy, asked(tokenizer, samples=1), top_p=1e-6)) == greedy
    for request in asked(tokenizer, samples=1):
        ids = torch.tensor([request.ids])
        plain = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0, ids.shape[1] :]
        assert tuple(plain.tolist()) == greedy[request.key]


def test_a_completion_ends_with_the_end_token_or_is_cut(policy: tuple[PreTrainedModel, Any]) -> None:
    tokenizer = policy[1]
    for sample in sampled(policy, asked(tokenizer, samples=20, tokens=30)).values():
        stopped = sample.ids[-1] == tokenizer.eos_token_id
        assert sample.finish == ("stop" if stopped else "length")
        assert stopped or len(sample.ids) == 30
        assert tokenizer.eos_token not in sample.text
        assert len(sample.logps) == len(sample.ids) == sample.tokens


def test_tokens_come_as_often_as_the_model_says(policy: tuple[PreTrainedModel, Any]) -> None:
    """First tokens of one prompt, 1500 times: the chi-squared of the ten likeliest and the rest."""
    model, tokenizer = policy
    request = asked(tokenizer, samples=1)[0]
    many = requests_for([request.prompt], samples=1500, temperature=0.5, max_new_tokens=1, seed=0)
    first = np.array([sample.ids[0] for sample in sampled(policy, many, batch_size=256, cache_tokens=2**14).values()])
    with torch.no_grad():
        wanted = (model(torch.tensor([request.ids])).logits[0, -1].double() / 0.5).softmax(-1).numpy()
    top = np.argsort(-wanted)[:10]
    counts = np.array([*((first == token).sum() for token in top), (~np.isin(first, top)).sum()])
    expected = 1500 * np.array([*wanted[top], 1 - wanted[top].sum()])
    assert ((counts - expected) ** 2 / expected).sum() < 29.6  # 0.1 % of ten degrees of freedom; the seed is fixed
