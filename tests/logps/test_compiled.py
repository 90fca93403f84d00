"""Compiled regions of a model compute what transformers' own code does, whatever the lengths, and only in a run's own forward."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PreTrainedModel

from halos.data.collate import pack
from halos.errors import UserError
from halos.examples import Completion, PackRow
from halos.logps import compiled, lora_linear
from halos.logps.attention import SEGMENTS, register
from halos.logps.compiled import compile_regions, regions_of
from halos.logps.model import LanguageModel
from halos.models import adapter
from halos.run.step_checks import refuse_unfit

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 90, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "GPTNeoX": {},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "target_parameters": [],
        "bias": "none", "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [],
        "init_from": None}  # fmt: skip


def model_of(name: str) -> PreTrainedModel:
    register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **KINDS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes compiled by another test, perhaps with another backend, are not used."""
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="aot_eager"))


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "trained", "expected"),
    [
        ("Llama", False, {"input_layernorm", "post_attention_layernorm", "mlp"}),
        ("Llama", True, {"mlp"}),  # a norm's weight is a vector
        ("Qwen3", False, {"input_layernorm", "post_attention_layernorm", "mlp", "self_attn.q_norm", "self_attn.k_norm"}),
        ("GPTNeoX", False, {"mlp"}),
        ("GPTNeoX", True, set()),  # biases
        ("Qwen3Moe", False, {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}),
    ],
)
def test_regions_are_norms_and_networks_without_experts_or_trained_vectors(name: str, trained: bool, expected: set[str]) -> None:
    model = model_of(name) if trained else frozen(model_of(name))
    regions = {id(region) for region in regions_of(model)}
    named = [path.partition("layers.")[2] for path, part in model.named_modules() if id(part) in regions]
    assert {path.partition(".")[2] for path in named} == expected
    assert len(named) == 2 * len(expected)


def batch_of(seed: int) -> list[PackRow]:
    """Pairs with a prompt in common, of random lengths."""
    random, rows = np.random.default_rng(seed), list[PackRow]()
    for _ in range(2):
        prompt = random.integers(3, 90, random.integers(2, 30)).astype(np.int32)
        for length in random.integers(1, 40, 2):
            completion = random.integers(3, 90, length).astype(np.int32)
            rows.append((prompt, Completion(completion, np.ones(length, bool))))
    return rows


def results(module: LanguageModel, seed: int) -> list[torch.Tensor]:
    """Log-probs, and gradients of all trained parameters."""
    values = module(pack(batch_of(seed))).values
    weighed = (values * torch.linspace(-1, 2, values.numel()).view(values.shape)).sum()
    return [values.detach(), *torch.autograd.grad(weighed, [each for each in module.parameters() if each.requires_grad])]


def adapted(model: PreTrainedModel) -> nn.Module:
    wrapped = adapter.attach(model, LORA, base="base", reward=None, seed=0)
    lora_linear.fuse(wrapped)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def equal(module: LanguageModel, seeds: range, expected: list[list[torch.Tensor]]) -> None:
    for seed, values in zip(seeds, expected, strict=True):
        for mine, its in zip(results(module, seed), values, strict=True):
            assert (mine - its).norm() <= 5e-6 * its.norm()


@pytest.mark.parametrize(("name", "lora"), [("Llama", False), pytest.param("Qwen3", True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("quick")
def test_numbers_and_gradients_are_those_of_the_model_and_no_length_is_compiled_again(name: str, *, lora: bool) -> None:
    model = model_of(name)
    module, seeds = LanguageModel(adapted(model) if lora else model), range(6)
    names = list(module.state_dict())
    expected = [results(module, seed) for seed in seeds]
    compile_regions(module)
    assert list(module.state_dict()) == names
    counters.clear()
    equal(module, seeds[:1], expected[:1])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1  # layers share them
    equal(module, seeds, expected)
    assert counters["stats"]["unique_graphs"] == graphs
    with torch.no_grad():
        module(pack(batch_of(0)))
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for seed in seeds:
            assert torch.allclose(module(pack(batch_of(seed))).values, expected[seed][0], atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs


def test_sampling_and_the_forward_that_proves_a_runs_own_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[int, ...]]()

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda part, hidden: (calls.append(tuple(hidden.shape)), function(part, hidden))[1]

    monkeypatch.setattr(torch, "compile", lambda function, **_: recording(function))
    module = LanguageModel(frozen(model_of("Llama")))
    compile_regions(module)
    with module.plainly():
        inner: Any = module.model
        inner.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
        inner(torch.arange(3, 9)[None])
    assert not calls
    module(pack(batch_of(0)))
    assert len(calls) == 6
    assert len(set(calls)) == 1


@pytest.mark.usefixtures("quick")
def test_hooks_within_a_region_are_called_and_removed() -> None:
    module, batch, calls = LanguageModel(frozen(model_of("Llama"))), pack(batch_of(0)), list[str]()
    expected = module(batch).values
    compile_regions(module)
    module(batch)
    [mlp, _] = (part for part in module.modules() if type(part).__name__ == "LlamaMLP")
    handle = mlp.get_submodule("up_proj").register_forward_hook(lambda *_: calls.append("up"))
    assert torch.allclose(module(batch).values, expected, atol=1e-6)
    assert calls == ["up"]
    handle.remove()
    module(batch)
    assert calls == ["up"]


def test_a_frozen_reference_is_compiled_where_the_policy_is() -> None:
    policy, reference = model_of("Llama"), frozen(model_of("Llama"))
    compile_regions(policy)
    compile_regions(reference, like=policy)
    names = [{name for name, part in each.named_modules() if hasattr(part, "is_compiled")} for each in (policy, reference)]
    assert names[0] == names[1] == {"model.layers.0.mlp", "model.layers.1.mlp"}
    compile_regions(reference, like=frozen(model_of("Qwen3")))
    assert {name for name, part in reference.named_modules() if hasattr(part, "is_compiled")} == names[1]


def test_a_compiler_that_fails_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **_: failing)
    module = LanguageModel(frozen(model_of("Llama")))
    compile_regions(module)
    with pytest.raises(UserError, match=r"train.compile=true: torch.compile of LlamaRMSNorm failed: .*Leave it out, or see"):
        module(pack(batch_of(0)))


@pytest.mark.parametrize(
    ("layers", "can", "message"),
    [
        (True, False, "train.compile=true: ZeRO-3 gathers the parameters"),
        (False, True, "Llama.* has no norm or feed-forward network without trained vectors"),
    ],
)
def test_what_cannot_be_compiled_is_refused(layers: bool, can: bool, message: str) -> None:
    model: Any = model_of("Llama")
    if not layers:
        model.model.layers = nn.ModuleList()
    strategy: Any = SimpleNamespace(can_compile=can, name="ZeRO-3")
    train: Any = SimpleNamespace(compile=True, working_weights="microbatch")
    with pytest.raises(UserError, match=message):
        refuse_unfit(train, model, strategy, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [["peft=none"], ["peft=lora", "train.activation_checkpointing=true"]])
def test_another_process_resumes_a_compiled_run_to_the_bit(settings: list[str], precision: str, tmp_path: Path) -> None:
    """And its policy is its own reference before the first step."""

    def train(*overrides: str) -> str:
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    run, again = tmp_path / "run", tmp_path / "again"
    log = train("loss=dpo", "model=tiny", "data=arithmetic", *settings, "train.compile=true", "train.steps=6",
                "checkpoint.every=3", "train.batch_size=8", "exp_name=run", f"output_root={tmp_path}",
                f"train.precision={precision}", "reference.cache=never")  # fmt: skip
    assert f"LlamaMLP{', LlamaRMSNorm' if 'peft=lora' in settings else ''}, when first called" in log
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert (first["step"], first["rewards/chosen"], first["rewards/rejected"]) == (1, 0.0, 0.0)
    shutil.copytree(run, again)
    shutil.rmtree(again / "FINAL")
    (again / "result.json").unlink()
    train(f"resume={again}/checkpoints/step-00000003")
    digests = [hashlib.sha256(next((each / "FINAL").glob("*.safetensors")).read_bytes()).hexdigest() for each in (run, again)]
    assert digests[0] == digests[1]
