"""An engine is compared with the policy by its log-probs of a few tokens: what is wrong with it is said, rounding is not."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from halos.config.defaults import section
from halos.config.schema import Sampler
from halos.errors import UserError
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.online import sample as stage
from halos.rollout import rescore
from halos.rollout.engines._vllm_server import ServerEngine
from halos.rollout.kl import rescore_with
from halos.rollout.types import Origin, Prompt, Request, Sample

from .vllm_server import VLLMServer, servers_of

REQUESTS = [Request(Prompt(f"p{n}", ()), 0, (20, 21, 22 + n, *range(100, 260)), n, 1.0, 24) for n in range(2)]


@pytest.fixture(scope="module")
def policy(cache: Path) -> tuple[PreTrainedModel, Any]:
    place = locate("tiny", None, cache)
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    return load_model(place, tokenizer, reward=False, dtype=torch.float32, attention="eager"), tokenizer


@pytest.fixture
def serve(policy: tuple[PreTrainedModel, Any]) -> Iterator[Callable[..., VLLMServer]]:
    with servers_of(policy[0]) as start:
        yield start


def engine(policy: tuple[PreTrainedModel, Any], server: VLLMServer, **changed: Any) -> ServerEngine:
    return ServerEngine(policy[1], section(Sampler, name="vllm", url=server.url, **changed), Origin("model"), stops=[1])


def probed(policy: tuple[PreTrainedModel, Any], engine: ServerEngine) -> rescore.Probe:
    asked = rescore.probe_requests(REQUESTS)
    probe = rescore.compared(engine.probe(asked), asked, own(policy))
    rescore.refuse_other_policy(probe, own(policy), where="the server", policy="runs/sft/FINAL")
    return probe


def own(policy: tuple[PreTrainedModel, Any]) -> rescore.Rescore:
    return lambda pairs, temperature: rescore_with(policy[0], pairs, temperature)


def test_rescored_log_probs_are_those_of_the_softmax_at_the_temperature(policy: tuple[PreTrainedModel, Any]) -> None:
    pairs = [((20, 21), (22, 30, 21)), ((20, 25, 30), (40,))]
    for pair, found in zip(pairs, rescore_with(policy[0], pairs, 2.0), strict=True):
        prompt, ids = pair
        logits = policy[0](torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double() / 2.0
        expected = logits.log_softmax(-1)[range(len(ids)), ids]
        assert np.allclose(found, expected.detach(), atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.5, "top_p": 0.5, "top_k": 3}], ids=["whole", "truncated"])
def test_the_policy_itself_is_accepted(
    keys: dict[str, Any], policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    assert probed(policy, engine(policy, serve(), **keys)).difference < 1e-5


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"processed": False}, "returns log-probs before temperature, .*--logprobs-mode processed_logprobs"),
        (
            {"step": 0.1},
            r"sample from the policy: .* are [\d.]+ nats .*; it has another model or other weights, .* Serve runs/sft/FINAL, in",
        ),
        ({"forced": {"repetition_penalty": 2.0}}, "tokens that occurred before are less likely, as with a repetition penalty"),
        ({"forced": {"top_k": 5}}, "does not sample from the policy"),
    ],
    ids=["raw", "coarse", "repetition penalty", "truncated"],
)
def test_what_does_not_sample_from_the_policy_is_refused_with_the_remedy(
    behaviour: dict[str, Any], said: str, policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    with pytest.raises(UserError, match=said):
        probed(policy, engine(policy, serve(**behaviour)))


def test_another_model_is_refused_and_one_that_differs_by_rounding_is_measured(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    other, rounded = serve(), serve(step=0.01)
    other._set({name: value * 1.5 for name, value in other.base.items()})
    with pytest.raises(UserError, match="does not sample from the policy"):
        probed(policy, engine(policy, other))
    difference = probed(policy, engine(policy, rounded)).difference
    samples = list(engine(policy, rounded).sample(REQUESTS))
    measured = rescore.differences(samples, [REQUESTS[int(each.prompt.id[1])].ids for each in samples], own(policy))
    assert 1e-3 < difference < rescore.REFUSED
    assert 1e-3 < measured.mean() < measured.max()


@pytest.mark.parametrize("reloads", [True, False])
def test_a_server_that_keeps_earlier_weights_is_refused_once_the_policy_has_moved(
    reloads: bool, policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer], tmp_path: Path
) -> None:
    server, proof = serve(reloads=reloads), rescore.ReloadProof()
    asked = engine(policy, server)
    proof.add(probed(policy, asked), own(policy), where="it")
    proof.add(probed(policy, asked), own(policy), where="it")
    assert not proof.is_complete, "the policy has not moved: nothing can be told"
    before = {name: value.clone() for name, value in policy[0].state_dict().items()}
    try:
        policy[0].load_state_dict({name: value * 1.01 for name, value in before.items()})
        weights = {name: value for name, value in policy[0].state_dict().items() if name != "lm_head.weight"}
        save_file({name: value.clone() for name, value in weights.items()}, tmp_path / "model.safetensors")
        asked.load(tmp_path)
        probe = probed(policy, asked)
        if reloads:
            proof.add(probe, own(policy), where="it")
            assert proof.is_complete
            return
        with pytest.raises(UserError, match="it takes new weights without an error and goes on to sample from earlier ones"):
            proof.add(probe, own(policy), where="it")
    finally:
        policy[0].load_state_dict(before)


@pytest.mark.parametrize(("given", "is_stale"), [(0.0, True), (0.2, False)])
def test_earlier_weights_are_seen_though_rounding_has_changed_a_token(given: float, is_stale: bool) -> None:
    """Servers that compute in bfloat16 sample other tokens for the same request now and then."""
    prompt, tokens = (1, 2), tuple(range(10, 34))
    moves = {False: 0.0, True: 0.2}

    def rescored(pairs: Any, temperature: float, *, later: bool = True) -> list[np.ndarray]:
        return [np.full(len(ids), -1.0 + moves[later]) for _, ids in pairs]

    rounding = np.where(np.arange(24) % 2, 0.02, -0.02)
    first = rescore.Probe([(prompt, tokens)], [1.0], -1.0 + rounding, np.full(24, -1.0))
    changed = (*tokens[:20], 77, 78)  # and it ended earlier
    later = rescore.Probe([(prompt, changed)], [1.0], -1.0 + given - rounding[:22], np.full(22, -0.8))
    proof = rescore.ReloadProof()
    proof.add(first, rescored, where="it")
    if is_stale:
        with pytest.raises(UserError, match="goes on to sample from earlier ones"):
            proof.add(later, rescored, where="it")
    else:
        proof.add(later, rescored, where="it")
    assert proof.is_complete


def test_differences_are_compared_at_each_samples_own_temperature(policy: tuple[PreTrainedModel, Any]) -> None:
    (pair,) = [((20, 21), (22, 30))]
    samples = []
    for temperature in (1.0, 0.5, 0.0):
        logps = own(policy)([pair], temperature)[0] + 0.25
        samples.append(Sample(Prompt("p", ()), 0, "", temperature=temperature, ids=pair[1], logps=tuple(logps)))
    assert rescore.differences(samples, 3 * [pair[0]], own(policy)) == pytest.approx(6 * [0.25])


def test_a_few_of_many_are_rescored_and_none_that_has_no_log_probs() -> None:
    samples = [Sample(Prompt(str(n), ()), 0, "", logps=(0.0,) if n % 2 else ()) for n in range(100)]
    assert [each.prompt.id for each in rescore.evenly(samples, 5)] == ["1", "21", "41", "61", "81"]
    assert rescore.evenly(samples, 0) == []


# --- the stage


def sampled(server: VLLMServer | None, cache: Path, place: Path, *words: str, model: str = "tiny") -> tuple[int, dict[str, Any]]:
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"How many {n}?"}) + "\n" for n in range(6)))
    engine = ["--sampler", "vllm", "--url", server.url, "--served-model", "m"] if server is not None else []
    status = stage.main([model, "--data", str(place / "prompts.jsonl"), "--output", str(place / "out.jsonl"), "-n", "2", *engine,
                         "--max-new-tokens", "8", "--cache-dir", str(cache), *words])  # fmt: skip
    meta = place / "out.meta.json"
    return status, json.loads(meta.read_text()) if meta.is_file() else {}


def test_the_stage_rescores_what_any_engine_sampled(
    serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, server in (("hf", None), ("vllm", serve())):
        (tmp_path / name).mkdir()
        status, meta = sampled(server, cache, tmp_path / name)
        assert (status, meta["rescored"]) == (0, 8)
        assert 0 < meta["mismatch/mean"] < meta["mismatch/max"] < 1e-4
    assert "more than rounding" not in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert "mismatch/mean" not in sampled(serve(), cache, tmp_path / "none", "--rescore", "0")[1]


def test_the_stage_refuses_a_server_before_it_samples(
    serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(processed=False)
    assert sampled(server, cache, tmp_path) == (2, {})
    assert "returns log-probs before temperature" in capsys.readouterr().err
    assert server.asked.total() == rescore.PROBES


@pytest.fixture
def moved(policy: tuple[PreTrainedModel, Any], cache: Path, tmp_path: Path) -> Path:
    """The policy after a round that moved it by less than what is refused."""
    place = shutil.copytree(locate("tiny", None, cache), tmp_path / "moved")
    generator = torch.Generator().manual_seed(0)
    weights = {name: value + 0.002 * torch.randn(value.shape, generator=generator)
               for name, value in load_file(place / "model.safetensors").items()}  # fmt: skip
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("step", [0.0, 0.001])
@pytest.mark.parametrize("is_stale", [True, False])
def test_the_stage_refuses_a_server_that_has_the_policy_of_the_round_before(
    is_stale: bool, step: float, moved: Path, serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server, rounded = serve(), serve(step=step)
    if not is_stale:
        rounded._set(load_file(moved / "model.safetensors"))
    place = tmp_path / "stage"
    place.mkdir()
    assert sampled(server, cache, place, model=str(moved))[0] == 0, "by its distance alone it passes"
    (place / "out.jsonl").unlink()
    status, _ = sampled(rounded, cache, place, "--previous", "tiny", model=str(moved))
    assert ("samples from the policy of the round before" in capsys.readouterr().err) is is_stale
    assert status == (2 if is_stale else 0)


def test_the_stage_warns_of_a_mismatch_that_is_no_rounding(
    serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(rescore, "REFUSED", 9.0)
    status, meta = sampled(serve(step=0.1), cache, tmp_path)
    assert (status, meta["mismatch/mean"] > 0.05) == (0, True)
    assert "warning: the sampler's log-probs of 8 samples are" in capsys.readouterr().err
