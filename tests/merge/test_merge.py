"""A merged model is the adapter model, for every kind of LoRA, architecture and base that is covered; the rest is refused."""

import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from halos.checkpoint import lineage
from halos.checkpoint.weights import save_adapter
from halos.errors import UserError
from halos.logps.auto import CLASSES
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import lora, merge, proof
from halos.merge.merge_and_prove import merge_and_prove
from halos.merge.preflight import check_merge
from halos.merge.probe import ProbeOutputs, bit_sums_of, outputs_of, probe_ids, rounding_unit
from halos.reward_kind import RewardKind

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROWN = 307


@dataclass(frozen=True)
class Architecture:
    settings: dict[str, Any]
    tied: bool = False  # as its family usually is
    embedding: str = "embed_tokens"
    biased: bool = False


ARCHITECTURES = {
    "Llama": Architecture({"num_key_value_heads": 2, "attention_bias": True}, biased=True),
    "Qwen2": Architecture({"num_key_value_heads": 2}, tied=True, biased=True),
    "GPTNeoX": Architecture({}, embedding="embed_in", biased=True),
    "GPT2": Architecture({}, tied=True, embedding="wte", biased=True),
    "Gemma": Architecture({"num_key_value_heads": 2, "head_dim": 16}, tied=True),
    "Mistral": Architecture({"num_key_value_heads": 2}),
    "Phi": Architecture({}, biased=True),
}
USUAL = tuple(name for name in ARCHITECTURES if name != "Phi")  # whose every variant is a cell of the table
EVERY = ("Llama", "Qwen2", "GPT2")  # untied, tied, and with transposed layers: every variant; of the others these, in CI
SOME = ("lora", "dora", "all biases", "grown, both whole", "embedding and head lora", "reward")


@dataclass(frozen=True)
class Variant:
    """`settings` of the LoRA, in which EMBEDDING stands for the architecture's own name; and of the base."""

    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    tokens: tuple[int, ...] = ()
    shard: str = "5GB"
    half: bool = False
    reward: RewardKind | None = None


VARIANTS = {
    "lora": Variant(),
    "rslora": Variant({"use_rslora": True}),
    "dora": Variant({"use_dora": True}),
    "patterns": Variant({"rank_pattern": {"0.*": 2, "1.*": 8}, "alpha_pattern": {"0.*": 32}}),
    "rslora patterns": Variant({"use_rslora": True, "rank_pattern": {".*0.*": 2}, "alpha_pattern": {".*1.*": 32}}),
    "lora biases": Variant({"bias": "lora_only"}),
    "all biases": Variant({"bias": "all"}),
    "head and embedding whole": Variant({"modules_to_save": ["lm_head", "EMBEDDING"]}),
    "embedding whole": Variant({"modules_to_save": ["EMBEDDING"]}),
    "head whole": Variant({"modules_to_save": ["lm_head"]}),
    "embedding lora": Variant({"target_modules": ["EMBEDDING"]}),
    "embedding dora": Variant({"target_modules": ["EMBEDDING"], "use_dora": True}),
    "head lora": Variant({"target_modules": ["lm_head"]}),
    "embedding and head lora": Variant({"target_modules": ["EMBEDDING", "lm_head"], "use_rslora": True}),
    "grown": Variant(vocabulary=GROWN, tokens=(300, 301)),
    "grown, embedding whole": Variant({"modules_to_save": ["EMBEDDING"]}, vocabulary=GROWN, tokens=(300, 301)),
    "grown, both whole": Variant({"modules_to_save": ["EMBEDDING", "lm_head"]}, vocabulary=GROWN, tokens=(300, 301)),
    "grown, embedding lora": Variant({"target_modules": ["EMBEDDING"]}, vocabulary=GROWN, tokens=(300, 301)),
    "tokens in padding": Variant({"modules_to_save": ["EMBEDDING"]}, tokens=(297, 298, 299)),
    "sharded": Variant(shard="60KB"),
    "bfloat16 base": Variant(half=True),
    "reward": Variant(reward=RewardKind.OUTCOME),
    "reward dora": Variant({"use_dora": True}, reward=RewardKind.OUTCOME),
    "reward grown": Variant(
        {"modules_to_save": ["EMBEDDING", "score"]}, vocabulary=GROWN, tokens=(300,), reward=RewardKind.OUTCOME
    ),
}


def senseless(name: str, variant: str, *, tied: bool) -> str | None:
    """Why a cell of the table does not exist."""
    if "bias" in variant and not ARCHITECTURES[name].biased:
        return "no layer of it has a bias"
    if variant.startswith("reward") and tied != ARCHITECTURES[name].tied:
        return "a reward model has no head to tie"
    return None


def cells() -> list[Any]:
    """Every cell, those that CI leaves out marked slow: half precision everywhere but for two, the unusual way of tying, and
    most of three architectures whose layers are those of others."""
    found = []
    for name in USUAL:
        for variant in VARIANTS:
            for tied in (False, True):
                for dtype in ("float32", "bfloat16"):
                    if senseless(name, variant, tied=tied):
                        continue
                    usual = tied == ARCHITECTURES[name].tied and (dtype == "float32" or variant in ("lora", "embedding whole"))
                    marks = () if usual and (name in EVERY or variant in SOME) else pytest.mark.slow
                    words = f"{name}-{variant}-{'tied' if tied else 'untied'}-{dtype}"
                    found.append(pytest.param(name, variant, tied, dtype, marks=marks, id=words))
    return found


def make_base(name: str, directory: Path, *, tied: bool, variant: Variant = VARIANTS["lora"]) -> Any:
    """A random model with biases that are not zero, saved, and loaded again as a run would."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **ARCHITECTURES[name].settings, tie_word_embeddings=tied)
    dtype = torch.bfloat16 if variant.half else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape).to(dtype)
    model.save_pretrained(directory, max_shard_size=variant.shard)
    auto = CLASSES[variant.reward]
    model = auto.from_pretrained(directory, dtype=torch.float32, **(variant.reward.labels if variant.reward else {}))
    grow(model, variant.vocabulary, variant.tokens)
    return model


def adapted(model: Any, name: str, *, seed: int = 2, **settings: Any) -> Any:
    """With an adapter whose every tensor was moved away from where it starts."""
    words = {"EMBEDDING": ARCHITECTURES[name].embedding}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    settings = {key: [words.get(each, each) for each in value] if isinstance(value, list) else value
                for key, value in settings.items()}  # fmt: skip
    if not hasattr(model, "lm_head"):
        settings["task_type"] = "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on tied layers
        found = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


def combined(case: proof.Case, output: Path, **settings: Any) -> proof.Proof:
    return merge_and_prove(case, output, lineage.hashes, **settings)


def said(model: Any, case: proof.Case) -> ProbeOutputs:
    """What a model that was trained outside of a run says, as a run would ask it."""
    size = max(case.vocabulary, SIZES["vocab_size"])
    ids = probe_ids(Vocabulary(size, case.tokens), size, reward=case.reward)
    values = outputs_of(model, ids, temperature=1.0, reward=case.reward)
    return ProbeOutputs(ids, values, lora.scales_of(model), rounding_unit(model, half=False), bit_sums_of(model))


def forward(model: Any) -> Any:
    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        at_once = len(ids) if model.config.pad_token_id is not None else 1
        return torch.cat([model(input_ids=rows).logits for rows in ids.split(at_once)])

    return logits


def trained(directory: Path, name: str, variant: Variant, *, tied: bool, dtype: str = "float32") -> tuple[Any, proof.Case]:
    """A base and an adapter in `directory`, the model that was trained, and what there is to merge."""
    model = adapted(make_base(name, directory / "base", tied=tied, variant=variant), name, **variant.settings)
    save_adapter(directory / "adapter", model)
    kind = getattr(torch, dtype)
    case = proof.Case(directory / "base", directory / "adapter", variant.reward, kind, variant.vocabulary, variant.tokens)
    (directory / "merged").mkdir()
    return model, case


@pytest.mark.parametrize(("name", "variant", "tied", "dtype"), cells())
def test_a_merged_model_is_the_adapter_model(name: str, variant: str, tied: bool, dtype: str, tmp_path: Path) -> None:
    model, case = trained(tmp_path, name, VARIANTS[variant], tied=tied, dtype=dtype)
    result = combined(case, tmp_path / "merged", model=model.get_base_model(), live=said(model, case))
    assert result.holds, result.faults
    ids = probe_ids(Vocabulary(), SIZES["vocab_size"])
    merged, report = case.auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, truth = forward(merged.eval())(ids), forward(model)(ids)
    if dtype == "float32":
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    with model.disable_adapter():
        untouched = forward(model)(ids)
    assert (found - untouched).abs().max() > 1e-3 * truth.abs().max(), "the adapter does nothing: no merge would pass as well"


@pytest.mark.parametrize("name", USUAL)
def test_an_adapter_on_disk_is_merged_without_the_model_that_was_trained(name: str, tmp_path: Path) -> None:
    _, case = trained(tmp_path, name, VARIANTS["grown, embedding whole"], tied=ARCHITECTURES[name].tied)
    assert combined(case, tmp_path / "merged").holds


def test_shards_are_no_larger_than_asked_for_and_their_index_is_right(tmp_path: Path) -> None:
    _, case = trained(tmp_path, "Llama", VARIANTS["sharded"], tied=False)
    assert combined(case, tmp_path / "merged", shard=60_000).holds
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size <= 65_000 or len(load_file(path)) == 1 for path in files)
    assert {path.name for path in files} == {path.name for path in tmp_path.glob("merged/model-*-of-*.safetensors")}


def test_a_half_precision_merge_rounds_once(tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["bfloat16 base"], tied=False, dtype="bfloat16")
    assert combined(case, tmp_path / "merged").holds
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = 6 / 4 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    wanted = (layer.base_layer.weight.float() + delta).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"], wanted)


def test_blocks_of_a_few_rows_give_what_whole_tensors_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variant in (("Llama", "dora"), ("GPT2", "dora"), ("Qwen2", "grown, embedding lora"), ("GPT2", "embedding dora")):
        place = tmp_path / f"{name}-{variant}"
        _, case = trained(place, name, VARIANTS[variant], tied=ARCHITECTURES[name].tied)
        merge.merge(case.base, case.adapter, place / "merged", model=case.empty_model(), dtype=case.dtype,
                    vocabulary=case.vocabulary, tokens=case.tokens)  # fmt: skip
        monkeypatch.setattr("halos.merge.safetensors_io.BLOCK", 1000)
        (place / "blocks").mkdir()
        assert combined(case, place / "blocks").holds
        monkeypatch.undo()
        whole, cut = (load_file(place / at / "model.safetensors") for at in ("merged", "blocks"))
        assert whole.keys() == cut.keys()
        for key, tensor in whole.items():
            assert torch.allclose(tensor, cut[key], atol=1e-6), key


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ({"lora_bias": True}, "lora_bias"),
    ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_qalora": True}, "use_qalora"),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED, ids=lambda part: part if isinstance(part, str) else None)
def test_a_kind_of_lora_that_is_not_covered_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"cannot merge: {named}.* is not covered; keep the adapter"):
        lora.refuse_uncovered(peft.LoraConfig(target_modules=["q_proj"], **settings))


@pytest.mark.parametrize("kind", ["VeraConfig", "IA3Config", "LoHaConfig", "AdaLoraConfig"])
def test_an_adapter_of_another_kind_is_refused_by_name(kind: str) -> None:
    settings = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **settings)
    with pytest.raises(UserError, match=config.peft_type.value):
        lora.refuse_uncovered(config)


def mixture(directory: Path) -> Any:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_experts_that_no_adapter_changes_pass_through(tmp_path: Path) -> None:
    model = adapted(mixture(tmp_path / "base"), "Llama", target_modules=["q_proj", "v_proj"])
    case = proof.Case(tmp_path / "base", tmp_path / "adapter", None, torch.float32)
    check_merge(case, model)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    (tmp_path / "merged").mkdir()
    assert combined(case, tmp_path / "merged").holds


def test_experts_that_loading_fuses_are_refused_before_training(tmp_path: Path) -> None:
    model = adapted(mixture(tmp_path / "base"), "Llama", target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(UserError, match=r"experts.* is fused with others when it is loaded"):
        check_merge(proof.Case(tmp_path / "base", tmp_path / "adapter", None, torch.float32), model)


def test_what_the_base_does_not_have_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    _, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    other = make_base("GPT2", tmp_path / "other", tied=True)
    assert other is not None
    with pytest.raises(UserError, match=r"which .* does not have"):
        combined(replace(case, base=tmp_path / "other"), tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_a_base_of_pickles_or_of_quantised_weights_is_refused(tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    config = json.loads((case.base / "config.json").read_text())
    (case.base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserError, match="are quantised on disk"):
        check_merge(case, model)
    (case.base / "config.json").write_text(json.dumps(config))
    (case.base / "model.safetensors").rename(case.base / "pytorch_model.bin")
    with pytest.raises(UserError, match="nothing is unpickled"):
        check_merge(case, model)
