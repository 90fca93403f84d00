"""vLLM by its two contracts: a process that speaks lines, a stub here, and a server, which samples from a small model here."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from halos.config.defaults import section
from halos.config.schema import Sampler
from halos.errors import UserError
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.rollout import servers
from halos.rollout.engines._token_engine import stops_of
from halos.rollout.engines._vllm_processes import SubprocessEngine
from halos.rollout.engines._vllm_server import ServerEngine
from halos.rollout.engines.vllm import VLLM
from halos.rollout.types import Origin, Prompt, Request, Sample

from .stub import Stub
from .vllm_server import VLLMServer, servers_of

ORIGIN = Origin("model", "v")
VLLM_MODULE = """
import json, os, sys, time

class SamplingParams:
    def __init__(self, **given): self.given = given

class Logprob:
    def __init__(self, value): self.logprob = value

class Out:
    def __init__(self, ids, reason):
        self.token_ids, self.finish_reason = ids, reason
        self.logprobs = [{token: Logprob(-0.5 * n)} for n, token in enumerate(ids)]

class Result:
    def __init__(self, name, out): self.request_id, self.outputs, self.finished = name, [out], True

class Engine:
    def __init__(self, about): self.about, self.left, self.done = about, [], []
    def add_request(self, name, prompt, settings):
        self.left.append((name, prompt, settings.given))
        if self.about["model"] == "broken": raise SystemExit(3)
    def has_unfinished_requests(self): return bool(self.left)
    def step(self):  # the last first
        name, prompt, given = self.left.pop()
        time.sleep(0.2 if os.environ.get("CUDA_VISIBLE_DEVICES") == "6,7" else 0)
        self.done.append(given)
        with open(f"{os.environ['LOG']}.{os.getpid()}", "w") as file:
            json.dump({**self.about, "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "asked": self.done}, file)
        return [Result(name, Out([given["seed"] % 50 + 10, *prompt["prompt_token_ids"][:2], 1], "stop"))]

class LLM:
    def __init__(self, **about):
        print("vLLM says many things")
        self.llm_engine = Engine(about)
"""
STATED = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_p": 1.0, "top_k": -1,
          "temperature": 1.0, "stop": [], "stop_token_ids": [1], "logit_bias": None}  # fmt: skip


@pytest.fixture(scope="module")
def policy(cache: Path) -> tuple[PreTrainedModel, Any]:
    place = locate("tiny", None, cache)
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    return load_model(place, tokenizer, reward=False, dtype=torch.float32, attention="eager"), tokenizer


@pytest.fixture
def serve(policy: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VLLMServer]]:
    """`serve(processed=False, ...)`: a server of that behaviour, which runs until the test ends. Nobody waits for it long."""
    monkeypatch.setattr(servers, "DELAYS", (0.01, 0.02))
    with servers_of(policy[0]) as start:
        yield start


def requests(count: int, *, tokens: int = 6, temperature: float = 1.0) -> list[Request]:
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": "x"},)) for n in range(count)]
    return [Request(prompt, 0, (20, 21, 22 + n % 200), n, temperature, tokens) for n, prompt in enumerate(prompts)]


def settings(**changed: Any) -> Sampler:
    return section(Sampler, name="vllm", **changed)


def engine(policy: tuple[PreTrainedModel, Any], server: VLLMServer, **changed: Any) -> ServerEngine:
    return ServerEngine(policy[1], settings(url=server.url, **changed), ORIGIN, stops=[1])


def sampled(engine: ServerEngine, asked: list[Request]) -> dict[Any, Sample]:
    return {sample.key: sample for sample in engine.sample(asked)}


# --- processes


@pytest.fixture
def start(
    tmp_path: Path, policy: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SubprocessEngine]]:
    """`start(model, replicas=2)`: the engine on an interpreter with a stub of vllm."""
    (tmp_path / "vllm.py").write_text(VLLM_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    running: list[SubprocessEngine] = []

    def open(model: str = "model", **changed: Any) -> SubprocessEngine:
        chosen = settings(**{"python": sys.executable, **changed})
        running.append(SubprocessEngine(model, policy[1], chosen, ORIGIN, stops=[1], dtype="bfloat16"))
        return running[-1]

    yield open
    for each in running:
        each.close()


def test_a_process_answers_every_request_as_it_is_done(
    start: Callable[..., SubprocessEngine], policy: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    engine = start()
    for _ in range(2):  # one process for all that is asked
        found = {sample.key: sample for sample in engine.sample(requests(3))}
        assert {key: sample.ids for key, sample in found.items()} == {(f"p{n}", 0): (10 + n, 20, 21, 1) for n in range(3)}
        first = found["p0", 0]
        assert first.logps == (0.0, -0.5, -1.0, -1.5)
        assert (first.finish, first.generator, first.vocabulary) == ("stop", "model", "v")
        assert policy[1].eos_token not in first.text
    [log] = [json.loads(path.read_text()) for path in tmp_path.glob("log.*")]
    about = {"model": "model", "dtype": "bfloat16", "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "seed": 0,
             "tensor_parallel_size": 1}  # fmt: skip
    assert log.items() >= about.items()
    assert all(given.items() >= STATED.items() for given in log["asked"])


def test_replicas_have_gpus_of_their_own_and_share_the_requests_as_they_free_up(
    start: Callable[..., SubprocessEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    engine = start(replicas=2, tensor_parallel=2, concurrency=1)
    assert {sample.key for sample in engine.sample(requests(20))} == {request.key for request in requests(20)}
    logs = [json.loads(path.read_text()) for path in tmp_path.glob("log.*")]
    assert {log["devices"]: log["tensor_parallel_size"] for log in logs} == {"4,5": 2, "6,7": 2}
    quick, slow = (len(log["asked"]) for log in sorted(logs, key=lambda log: log["devices"]))
    assert quick > slow, "a slow one gets fewer"
    assert sorted(given["seed"] for log in logs for given in log["asked"]) == list(range(20))
    with pytest.raises(UserError, match=r"replicas=3 of online.sampler.tensor_parallel=2 GPUs each need 6 GPUs, and there are 4"):
        start(replicas=3, tensor_parallel=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one process starts vLLM, on all GPUs: leave out accelerate launch"):
        start()


def test_a_process_that_dies_is_reported(start: Callable[..., SubprocessEngine]) -> None:
    with pytest.raises(UserError, match=r"ended before it had answered: exit status 3;"):
        list(start("broken").sample(requests(1)))
    with pytest.raises(UserError, match="cannot be started"):
        start(python="/no/such/python")


def test_keys_of_processes_have_no_effect_on_a_server() -> None:
    problem = VLLM.problem(settings(url="http://x/v1", replicas=2), lambda name: f"online.sampler.{name}")
    assert problem is not None
    assert problem.startswith("online.sampler.replicas has no effect: online.sampler.url names a server, which has its own")


# --- a server


def test_a_server_gives_tokens_with_their_log_probs(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    """Held against the model's own softmax."""
    asked = requests(8, temperature=0.7)
    found = sampled(engine(policy, serve()), asked)
    for request in asked:
        sample = found[request.key]
        logits = policy[0](torch.tensor([[*request.ids, *sample.ids]])).logits[0, len(request.ids) - 1 : -1]
        own = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        assert torch.allclose(own, torch.tensor(sample.logps), atol=1e-5)
        assert sample.finish == ("stop" if sample.ids[-1] == 1 else "length")


def test_the_servers_generation_config_changes_nothing(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    own = {"repetition_penalty": 1.5, "min_p": 0.3, "top_k": 2, "top_p": 0.5, "temperature": 0.2, "frequency_penalty": 1.0}
    clean = sampled(engine(policy, serve()), requests(8))
    server = serve(generation_config=own)
    assert sampled(engine(policy, server), requests(8)) == clean
    assert all(body.items() >= STATED.items() for body in server.bodies)
    forced = sampled(engine(policy, serve(forced={"repetition_penalty": 1.5})), requests(8))
    assert forced != clean, "which the comparison would see"


def test_as_many_requests_are_in_flight_as_the_server_runs(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    server = serve(held_until=256)
    assert len(sampled(engine(policy, server), requests(300, tokens=1))) == 300
    assert server.most == 256
    few = serve()
    sampled(engine(policy, few, concurrency=3), requests(12, tokens=1))
    assert few.most <= 3


def test_ranks_share_the_requests_in_flight(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    server = serve(held_until=16)
    assert len(sampled(engine(policy, server), requests(40, tokens=1))) == 40
    assert server.most == 16


def test_a_slow_completion_holds_no_other_back(policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]) -> None:
    server = serve(first_waits_for=19)
    found = [sample.key for sample in engine(policy, server, concurrency=2).sample(requests(20, tokens=1))]
    slow = next(iter(server.asked))  # the first that it saw
    assert found.index((f"p{slow}", 0)) >= 18


def test_a_server_that_is_lost_or_busy_is_asked_again_with_the_same_results(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = sampled(engine(policy, serve()), requests(8))
    for trouble in ({"drops": 4}, {"busy": 4}):
        assert sampled(engine(policy, serve(**trouble)), requests(8)) == clean, trouble
    assert "the engine is busy" in caplog.text
    assert "asking again for up to 0 seconds" in caplog.text
    never = engine(policy, serve(busy=99))
    with pytest.raises(UserError, match=r"answers 503: .*the engine is busy"):
        sampled(never, requests(2))


@pytest.fixture
def sampled_by(policy: tuple[PreTrainedModel, Any], tmp_path: Path) -> Callable[..., dict[Any, Sample]]:
    """`sampled_by(server, concurrency=3)`: samples of other weights than those that the server was started with."""
    save_file({name: value * 1.3 for name, value in policy[0].state_dict().items() if name != "lm_head.weight"},
              tmp_path / "model.safetensors")  # fmt: skip

    def sample(server: VLLMServer, concurrency: int) -> dict[Any, Sample]:
        loaded = engine(policy, server, concurrency=concurrency)
        loaded.load(tmp_path)
        loaded.weights = tmp_path
        return sampled(loaded, requests(8))

    return sample


def test_a_server_that_forgot_its_weights_gets_them_again(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer], sampled_by: Callable[..., dict[Any, Sample]]
) -> None:
    clean = sampled_by(serve(), concurrency=3)
    assert clean != sampled(engine(policy, serve()), requests(8))
    for trouble in ({"drops": 3}, {"busy": 3}):  # itself, or behind a proxy
        server = serve(**trouble, forgets=True)
        assert sampled_by(server, concurrency=3) == clean, trouble  # as many in flight as fail
        assert len(server.loaded) > 1


def test_a_server_that_is_lost_while_it_loads_is_given_its_weights_again(
    serve: Callable[..., VLLMServer], sampled_by: Callable[..., dict[Any, Sample]]
) -> None:
    clean = sampled_by(serve(), concurrency=1)
    between = {"drops": 1, "forgets": True, "lost_in_load": 2}
    for trouble, loads in (({"lost_in_load": 1}, 2), (between, 3)):  # before the first sample, or between two
        server = serve(**trouble)
        assert sampled_by(server, concurrency=1) == clean, trouble
        assert len(server.loaded) == loads  # and not once more for each completion


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"returns_ids": False}, "returns no token_ids: online.sampler.name=vllm needs a vLLM server from 0.10.2 on"),
        ({"name": "other"}, "The model `model` does not exist.*online.sampler.model is the model's name there"),
        ({"stops": tuple(range(2, 300))}, r"ended a completion at the token \d+ .*--generation-config vllm"),
        ({"generation_config": {"max_new_tokens": 2}}, r"ended a completion after 2 tokens \(length\) where 6 were asked for"),
        ({"max_model_len": 8}, "answers 400: .*maximum context length is 8 tokens"),
    ],
    ids=["old", "other model", "stops", "shorter", "short context"],
)
def test_a_server_that_answers_otherwise_than_asked_is_refused(
    behaviour: dict[str, Any], said: str, policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer]
) -> None:
    with pytest.raises(UserError, match=said):
        sampled(engine(policy, serve(**behaviour)), requests(4))


def test_a_server_without_development_mode_takes_no_weights(
    policy: tuple[PreTrainedModel, Any], serve: Callable[..., VLLMServer], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"answers 404: .*start it with VLLM_SERVER_DEV_MODE=1"):
        engine(policy, serve(dev_mode=False)).load(tmp_path)
    nowhere = ServerEngine(policy[1], settings(url="http://127.0.0.1:9/v1"), ORIGIN, stops=[1])
    with pytest.raises(UserError, match="does not answer: ConnectError"):
        nowhere.load(tmp_path)


def test_the_end_tokens_are_those_of_the_model_the_tokenizer_and_the_template(
    policy: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    policy[0].config.save_pretrained(tmp_path)
    assert stops_of(tmp_path, policy[1]) == [1], "of the config, where there is no generation config"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stops_of(tmp_path, policy[1]) == [1, 7, 9]


def test_a_key_that_a_server_quotes_is_hidden_before_its_answer_is_cut(
    policy: tuple[PreTrainedModel, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0123456789abcdef")
    server = Stub(fail=401, quote="x" * 265 + "sk-not-a-key-0123456789abcdef")
    with pytest.raises(UserError, match="answers 401") as refused:
        ServerEngine(policy[1], settings(url=server.url), ORIGIN, stops=[1]).load(tmp_path)
    server.close()
    assert "sk-not" not in str(refused.value)
