"""A sampling engine is one file: what the rest of the code asks of it is what its class declares."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import halos.rollout.engines
from halos.config.defaults import section
from halos.config.rollout_modules import engine_class, engine_names
from halos.config.schema import Config, Sampler
from halos.config.secrets import refuse_saved_addresses
from halos.errors import UserError
from halos.online import policy, sample
from halos.online.stages import Stages
from halos.rollout.engines.engine import Engine
from halos.rollout.engines.openai import ChatEngine
from halos.rollout.types import Origin, Prompt, Request

from .stub import Stub

ROOT = Path(__file__).resolve().parents[2]
ECHO = """
from halos.rollout.engines.engine import Engine
from halos.rollout.types import Sample

class Echo(Engine):
    is_paid, reads_tokens, addresses, takes = True, False, ("url",), ("url",)

    @classmethod
    def problem(cls, settings, spelled):
        return None if settings.url else f"{spelled('url')} is missing: echoes come from somewhere"

    @classmethod
    def open(cls, settings, origin, *, directory, tokenizer, model, dtype):
        assert directory is None and tokenizer is None
        echo = cls()
        echo.origin = origin
        return echo

    def sample(self, requests):
        for request in reversed(requests):
            yield Sample.of(request, self.origin, request.prompt.turns[0]["content"].upper(), finish="stop", tokens=1)

ENGINE = Echo
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file, in a directory beside the package's own; the names in the schema were read before it came."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "echo.py").write_text(ECHO)
    monkeypatch.setattr(halos.rollout.engines, "__path__", [*halos.rollout.engines.__path__, str(tmp_path / "engines")])
    (name,) = (each for each in fields(Sampler) if each.name == "name")
    monkeypatch.setitem(name.metadata["limits"], "one_of", engine_names())
    yield
    sys.modules.pop("halos.rollout.engines.echo", None)


def test_every_module_is_an_engine_and_a_name_of_the_schema() -> None:
    (name,) = (each for each in fields(Sampler) if each.name == "name")
    assert name.metadata["limits"]["one_of"] == engine_names() == ("hf", "openai", "vllm")
    for each in engine_names():
        assert issubclass(engine_class(each), Engine)
        assert {*engine_class(each).addresses} <= {*engine_class(each).takes} <= {each.name for each in fields(Sampler)}


def test_a_new_file_is_an_engine_everywhere(echo: None, configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=online", "online.loss=grpo", "online.num_processes=2", "online.sampler.name=echo"]
    with pytest.raises(UserError, match=r"online\.sampler\.url is missing: echoes come from somewhere"):
        configure(*words)
    with pytest.raises(UserError, match=r"online\.sampler\.python has no effect with .*=echo, which takes url: leave it out"):
        configure(*words, "online.sampler.url=http://echo", "online.sampler.python=/bin/idle")
    config: Any = configure(*words, "online.sampler.url=http://echo")
    config.online.sampler.python = "/bin/idle"
    with pytest.raises(UserError, match=r"names online\.sampler\.url=http://echo"):
        refuse_saved_addresses(config, [])
    refuse_saved_addresses(config, ["online.sampler.url"])  # the other key is none of its own
    with pytest.raises(UserError, match=r"a live loop samples with .*, not echo"):
        policy.server_of(config, SimpleNamespace(get_vocab=dict))  # type: ignore[arg-type]
    command = Stages(config).sample("model", tmp_path / "p", tmp_path / "s", seed=0, max_length=9, reference=None)
    assert command[1:3] == ["-m", "halos.online.sample"], "it has no model to spread over two processes"


def test_the_stage_samples_with_it_and_reads_no_model(echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two")))
    words = ["no/such/model", "--data", str(prompts), "--output", str(output), "-n", "2", "--sampler", "echo"]
    assert sample.main(words) == 2
    assert "--url is missing: echoes come from somewhere" in capsys.readouterr().err
    assert sample.main([*words, "--url", "http://echo", "--cache-tokens", "99"]) == 2
    assert "--cache-tokens has no effect with --sampler echo: leave it out" in capsys.readouterr().err
    assert sample.main([*words, "--url", "http://echo"]) == 0
    assert [json.loads(line)["output"] for line in output.read_text().splitlines()] == ["ONE", "ONE", "TWO", "TWO"]


def test_nobody_asks_an_engine_for_its_name() -> None:
    for path in (ROOT / "halos").rglob("*.py"):
        assert not re.search(r"sampler\.name\s*(==|!=|in\b|not in\b)", path.read_text()), path


def test_what_an_engine_declares_is_read_without_what_it_stands_on() -> None:
    code = "from halos.config.rollout_modules import *; [*map(engine_class, engine_names())]; import sys; print({*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "openai", "vllm"} & eval(done.stdout)


def test_a_key_that_a_server_quotes_is_in_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-not-a-key-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = Stub(quote=key)
    engine = ChatEngine(section(Sampler, name="openai", url=server.url), Origin("m"))
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": f"question {n}"},)) for n in range(40)]
    texts = [each.text for each in engine.sample([Request(prompt, 0, (), 0, 0.0, 8) for prompt in prompts])]
    server.close()
    assert len(texts) == 40
    assert "(<OPENAI_API_KEY>)" in "".join(texts)
    assert key not in "".join(texts)


def test_tools_and_settings_of_a_row_are_given_to_a_server_besides_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    server, asked = Stub(), list[dict[str, Any]]()
    engine = ChatEngine(section(Sampler, name="openai", url=server.url), Origin("m"))

    class Completions:
        async def create(self, **body: Any) -> Any:
            asked.append(body)
            message = SimpleNamespace(message=SimpleNamespace(content="two"), finish_reason="stop")
            return SimpleNamespace(choices=[message], usage=None)

    client = SimpleNamespace(chat=SimpleNamespace(completions=Completions()))
    tools = [{"type": "function", "function": {"name": "add"}}]
    for settings in ({"tools": tools, "enable_thinking": False}, None):
        turn = {"role": "user", "content": "1?", **({"chat_template_kwargs": settings} if settings else {})}
        asyncio.run(engine._ask(client, Request(Prompt("p", (turn,)), 0, (), 0, 0.0, 8)))
    server.close()
    assert [body["messages"] for body in asked] == [[{"role": "user", "content": "1?"}]] * 2
    assert (asked[0]["tools"], asked[0]["extra_body"]) == (tools, {"chat_template_kwargs": {"enable_thinking": False}})
    assert not {"tools", "extra_body"} & asked[1].keys()
