"""vLLM by its two contracts: a process that speaks lines, and a server that speaks token ids; both are stubs here."""

import sys
from pathlib import Path
from typing import Any

import pytest

from halos.config.defaults import section
from halos.config.schema import Sampler
from halos.errors import UserError
from halos.models.load import load_tokenizer
from halos.models.locate import locate
from halos.rollout.engines.vllm import ServerEngine, SubprocessEngine
from halos.rollout.types import Origin, Prompt, Request

from .stub import Stub

ORIGIN = Origin("model", "v")
VLLM = """
class SamplingParams:
    def __init__(self, **given): self.__dict__ |= given

class Logprob:
    def __init__(self, value): self.logprob = value

class Out:
    def __init__(self, ids, reason):
        self.token_ids, self.finish_reason = ids, reason
        self.logprobs = [{token: Logprob(-0.5 * n)} for n, token in enumerate(ids)]

class Result:
    def __init__(self, out): self.outputs = [out]

class LLM:
    def __init__(self, model):
        print("vLLM says many things")
        self.model = model
    def generate(self, prompts, settings, use_tqdm):
        if self.model == "broken": raise SystemExit(3)
        return [Result(Out([s.seed % 50 + 10, *p["prompt_token_ids"][:2], 1], "stop")) for p, s in zip(prompts, settings)]
"""


def requests(count: int) -> list[Request]:
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": "x"},)) for n in range(count)]
    return [Request(prompt, 0, (20, 21, 22 + n), n, 1.0, 6) for n, prompt in enumerate(prompts)]


def settings(**changed: Any) -> Sampler:
    return section(Sampler, name="vllm", **changed)


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


def test_a_process_answers_every_request(interpreter: str, cache: Path) -> None:
    tokenizer, _ = load_tokenizer(locate("tiny", None, cache), add_tokens=[])
    engine = SubprocessEngine("model", tokenizer, settings(python=interpreter), ORIGIN)
    for _ in range(2):  # one process for all that is asked
        found = list(engine.sample(requests(3)))
        assert [sample.key for sample in found] == [("p0", 0), ("p1", 0), ("p2", 0)]
        assert [sample.ids for sample in found] == [(10 + n, 20, 21, 1) for n in range(3)]
        assert found[0].logps == (0.0, -0.5, -1.0, -1.5)
        assert (found[0].finish, found[0].generator, found[0].vocabulary) == ("stop", "model", "v")
        assert tokenizer.eos_token not in found[0].text


def test_a_process_that_dies_is_reported(interpreter: str, cache: Path) -> None:
    tokenizer, _ = load_tokenizer(locate("tiny", None, cache), add_tokens=[])
    with pytest.raises(UserError, match=r"ended before it had answered"):
        list(SubprocessEngine("broken", tokenizer, settings(python=interpreter), ORIGIN).sample(requests(1)))
    with pytest.raises(UserError, match="cannot be started"):
        SubprocessEngine("model", tokenizer, settings(python="/no/such/python"), ORIGIN)


def test_a_server_gives_tokens_and_takes_weights(cache: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(locate("tiny", None, cache), add_tokens=[])
    server = Stub()
    engine = ServerEngine(tokenizer, settings(url=server.url, concurrency=4), ORIGIN)
    found = list(engine.sample(requests(8)))
    assert len(found) == 8
    assert all(len(sample.ids) == len(sample.logps) > 0 for sample in found)
    assert {sample.finish for sample in found} <= {"stop", "length"}
    engine.load(tmp_path)
    assert server.loaded == [str(tmp_path)]
    server.close()
    with pytest.raises(UserError, match="does not answer"):
        ServerEngine(tokenizer, settings(url="http://127.0.0.1:9/v1"), ORIGIN).load(tmp_path)


def test_a_key_that_a_server_quotes_is_hidden_before_its_answer_is_cut(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-0123456789abcdef")
    tokenizer, _ = load_tokenizer(locate("tiny", None, cache), add_tokens=[])
    server = Stub(fail=401, quote="x" * 265 + "sk-not-a-key-0123456789abcdef")
    with pytest.raises(UserError, match="answers 401") as refused:
        ServerEngine(tokenizer, settings(url=server.url), ORIGIN).load(tmp_path)
    server.close()
    assert "sk-not" not in str(refused.value)
