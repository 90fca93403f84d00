"""What can go wrong with a merge, done on purpose: each fault is caught by the proof, and nothing merged is left behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_merge import VARIANTS, Variant, adapted, combined, make_base, trained
from torch import nn

from halos.config.schema import Config
from halos.distributed.parameters import is_shard, local_part
from halos.errors import UserError
from halos.merge import lora, merge, probe, proof, safetensors_io
from halos.merge.lora import Update
from halos.run.lifecycle import run

Tensors = dict[str, torch.Tensor]
Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
K0, BIAS, UP0 = Q0.replace("q_proj", "k_proj"), Q0.replace("weight", "bias"), "model.layers.0.mlp.up_proj.weight"
O0, HEAD, EMBEDDING = Q0.replace("q_proj", "o_proj"), "lm_head.weight", "model.embed_tokens.weight"
EVERYTHING = Variant({"bias": "lora_only", "use_rslora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}})


# --- faults of the file: (tensors of the merged model, of the base) -> what lies on the disk instead


def dropped_bias(merged: Tensors, base: Tensors) -> None:
    merged[BIAS] = base[BIAS]


def bias_lost(merged: Tensors, base: Tensors) -> None:
    del merged[BIAS]


def not_merged(merged: Tensors, base: Tensors) -> None:
    merged[Q0] = base[Q0]


def applied_twice(merged: Tensors, base: Tensors) -> None:
    merged[Q0] = (2 * merged[Q0].float() - base[Q0].float()).to(merged[Q0].dtype)


def wrong_alpha(merged: Tensors, base: Tensors) -> None:
    for name in base.keys() & merged.keys():
        merged[name] = (base[name].float() + 1.5 * (merged[name].float() - base[name].float())).to(merged[name].dtype)


def transposed(merged: Tensors, base: Tensors) -> None:
    merged[Q0] = merged[Q0].T.contiguous()


def layers_swapped(merged: Tensors, base: Tensors) -> None:
    merged[Q0], merged[Q1] = merged[Q1], merged[Q0]


def off_by_one_layer(merged: Tensors, base: Tensors) -> None:
    merged[Q1] = base[Q1] + (merged[Q0].float() - base[Q0].float()).to(merged[Q0].dtype)


def heads_permuted(merged: Tensors, base: Tensors) -> None:
    merged[Q0] = merged[Q0].roll(16, 0)


def layer_lost(merged: Tensors, base: Tensors) -> None:
    for name in [name for name in merged if ".layers.1." in name]:
        del merged[name]


def extra_tensor(merged: Tensors, base: Tensors) -> None:
    merged["model.layers.7.self_attn.q_proj.weight"] = merged[Q0].clone()


def saved_module_forgotten(merged: Tensors, base: Tensors) -> None:
    merged[HEAD] = base[HEAD]


def wrong_dtype(merged: Tensors, base: Tensors) -> None:
    merged[Q0] = merged[Q0].to(torch.float16)


def not_a_number(merged: Tensors, base: Tensors) -> None:
    merged[UP0][3, 3] = float("nan")


def infinite(merged: Tensors, base: Tensors) -> None:
    merged[UP0][3, 3] = float("inf")


def one_value_off(merged: Tensors, base: Tensors) -> None:
    merged[UP0][3, 3] += 0.02 * merged[UP0].abs().max()


def vocabulary_cut(merged: Tensors, base: Tensors) -> None:
    merged[EMBEDDING] = merged[EMBEDDING][:-1].clone()


def vocabulary_shifted(merged: Tensors, base: Tensors) -> None:
    merged[EMBEDDING] = merged[EMBEDDING].roll(1, 0)


def rounded_twice(merged: Tensors, base: Tensors) -> None:
    merged[O0] = merged[O0].to(torch.float8_e5m2).to(merged[O0].dtype)


IN_THE_FILE = [
    dropped_bias, bias_lost, not_merged, applied_twice, wrong_alpha, transposed, layers_swapped, off_by_one_layer, heads_permuted,
    layer_lost, extra_tensor, saved_module_forgotten, wrong_dtype, not_a_number, infinite, one_value_off, vocabulary_cut,
    vocabulary_shifted, rounded_twice,
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", IN_THE_FILE, ids=lambda fault: fault.__name__)
def test_a_wrong_tensor_fails_the_proof(
    fault: Callable[..., None], dtype: str, right: Callable[..., proof.Case], tmp_path: Path
) -> None:
    case = right(tmp_path, dtype=dtype)
    path = tmp_path / "merged" / "model.safetensors"
    merged, base = load_file(path), load_file(tmp_path / "base" / "model.safetensors")
    fault(merged, base)
    save_file(merged, path, metadata={"format": "pt"})
    assert_fails(case, tmp_path / "merged")


def merged_well(place: Path, variant: Variant, *, name: str = "Llama", tied: bool = False, dtype: str = "float32") -> Any:
    model, case = trained(place, name, variant, tied=tied, dtype=dtype)
    result = combined(case, place / "merged", shard=100_000 if variant.shard != "5GB" else safetensors_io.SHARD)
    assert result.holds, result.faults
    return model, case


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., proof.Case]:
    """`right(place, dtype=...)`: a copy there of a right merge of EVERYTHING, which is made once."""
    made: dict[str, proof.Case] = {}

    def copied(place: Path, *, dtype: str = "float32") -> proof.Case:
        if first := dtype not in made:
            _, made[dtype] = merged_well(tmp_path_factory.mktemp(dtype), EVERYTHING, dtype=dtype)
        shutil.copytree(made[dtype].base.parent, place, dirs_exist_ok=True)
        case = replace(made[dtype], base=place / "base", adapter=place / "adapter")
        assert not first or proof.prove(case, place / "merged").holds, "the copy, before anything is done to it"
        return case

    return copied


def assert_fails(case: proof.Case, merged: Path) -> None:
    result = proof.prove(case, merged)
    assert not result.holds
    assert result.report()["faults"]


# --- faults of the merge itself


def scaled_as_plain_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "scaling", lambda config, layer, rank: config.lora_alpha / rank)


def scaled_by_the_common_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "scaling", lambda config, layer, rank: config.lora_alpha / config.r**0.5)


def ranks_permuted(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Update.added
    monkeypatch.setattr(Update, "added", lambda self, *given: added(replace(self, a=self.a.flip(0)), *given))


def subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Update.added
    monkeypatch.setattr(Update, "added", lambda self, *given: added(replace(self, scaling=-self.scaling), *given))


def lost_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Update.added
    monkeypatch.setattr(Update, "added", lambda self, *given: added(self, *given).to(torch.bfloat16).double())


@pytest.mark.parametrize(
    "fault",
    [scaled_as_plain_lora, scaled_by_the_common_rank, ranks_permuted, subtracted, lost_in_half_precision],
    ids=lambda fault: fault.__name__,
)
def test_a_wrong_merge_fails_its_proof(fault: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, case = trained(tmp_path, "Llama", EVERYTHING, tied=False)
    fault(monkeypatch)
    assert_leaves_nothing(case, tmp_path / "merged")


def assert_leaves_nothing(case: proof.Case, merged: Path) -> None:
    result = combined(case, merged)
    assert not result.holds
    report = json.loads((merged / "merge_report.json").read_text())
    assert not report["holds"]
    assert report["faults"]
    assert not list(merged.glob("*.safetensors*"))
    assert not (merged / "config.json").exists()


def dora_norm_over_the_other_axis(self: Update, weight: Any, rows: Any) -> Any:
    assert self.magnitude is not None
    whole = torch.cat([self.added(rows(*span), span[0]) for span in weight])
    yield whole * (self.magnitude[:, None] / whole.norm(dim=0)[: len(whole), None])


def dora_norm_of_the_base_alone(self: Update, weight: Any, rows: Any) -> Any:
    assert self.magnitude is not None
    base = torch.cat([rows(*span).float() for span in weight])
    yield self.added(base, 0) * (self.magnitude / base.norm(dim=1))[:, None]


@pytest.mark.parametrize("fault", [dora_norm_over_the_other_axis, dora_norm_of_the_base_alone], ids=lambda fault: fault.__name__)
def test_a_wrong_norm_of_dora_fails_its_proof(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_square = Variant({"use_dora": True, "target_modules": ["q_proj"]})
    _, case = trained(tmp_path, "Llama", only_square, tied=False)
    monkeypatch.setattr(Update, "merged", fault)
    assert_leaves_nothing(case, tmp_path / "merged")


def test_a_square_conv1d_taken_for_a_linear_layer_fails_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, case = trained(tmp_path, "GPT2", Variant({"target_modules": ["attn.c_proj"]}), tied=True)
    monkeypatch.setattr(merge.Merge, "_is_transposed", lambda *_: False)
    assert_leaves_nothing(case, tmp_path / "merged")


def test_a_tied_head_that_follows_the_trained_embedding_fails_its_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, case = trained(tmp_path, "Qwen2", VARIANTS["embedding whole"], tied=True)
    monkeypatch.setattr(merge.Merge, "unties", False)
    assert_leaves_nothing(case, tmp_path / "merged")


def test_new_rows_that_start_elsewhere_fail_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, case = trained(tmp_path, "Llama", VARIANTS["grown"], tied=False)
    monkeypatch.setattr(merge, "fresh_rows", lambda known, size, tokens: [*range(known - 1, size)])
    assert_leaves_nothing(case, tmp_path / "merged")


# --- faults of what lies around the tensors


def wrong_adapter(place: Path, case: proof.Case) -> proof.Case:
    other = adapted(make_base("Llama", place / "again", tied=False), "Llama", seed=7, **EVERYTHING.settings)
    other.save_pretrained(str(place / "other"), save_embedding_layers=False)
    return replace(case, adapter=place / "other")


def wrong_base(place: Path, case: proof.Case) -> proof.Case:
    tensors = load_file(place / "base" / "model.safetensors")
    shutil.copytree(place / "base", place / "other")
    save_file({**tensors, UP0: 1.001 * tensors[UP0]}, place / "other" / "model.safetensors", metadata={"format": "pt"})
    return replace(case, base=place / "other")


def truncated(place: Path, case: proof.Case) -> None:
    path = place / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cleared_tail(place: Path, case: proof.Case) -> None:
    path = place / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))


def empty_file(place: Path, case: proof.Case) -> None:
    (place / "merged" / "model.safetensors").write_bytes(b"")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def other_rope(place: Path, case: proof.Case) -> None:
    edit(place / "merged" / "config.json", lambda config: config["rope_parameters"].update(rope_theta=5000.0))


def other_epsilon(place: Path, case: proof.Case) -> None:
    edit(place / "merged" / "config.json", lambda config: config.update(rms_norm_eps=1e-5))


def tied_by_mistake(place: Path, case: proof.Case) -> None:
    edit(place / "merged" / "config.json", lambda config: config.update(tie_word_embeddings=True))


def other_vocabulary(place: Path, case: proof.Case) -> None:
    edit(place / "merged" / "config.json", lambda config: config.update(vocab_size=299))


def fewer_layers(place: Path, case: proof.Case) -> None:
    edit(place / "merged" / "config.json", lambda config: config.update(num_hidden_layers=1))


def other_rank(place: Path, case: proof.Case) -> None:
    edit(place / "adapter" / "adapter_config.json", lambda config: config.update(r=5))


def other_alpha(place: Path, case: proof.Case) -> None:
    edit(place / "adapter" / "adapter_config.json", lambda config: config.update(lora_alpha=7))


def stale_file(place: Path, case: proof.Case) -> None:
    shutil.copy(place / "base" / "model.safetensors", place / "merged" / "model-00001-of-00002.safetensors")


AROUND = [
    wrong_adapter, wrong_base, other_rank, other_alpha, truncated, cleared_tail, empty_file, other_rope, other_epsilon,
    tied_by_mistake, other_vocabulary, fewer_layers, stale_file,
]  # fmt: skip


@pytest.mark.parametrize("fault", AROUND, ids=lambda fault: fault.__name__)
def test_what_lies_around_the_tensors_is_proved_too(
    fault: Callable[..., proof.Case | None], right: Callable[..., proof.Case], tmp_path: Path
) -> None:
    case = right(tmp_path)
    assert_fails(fault(tmp_path, case) or case, tmp_path / "merged")


def shard_lost(merged: Path, files: list[Path]) -> None:
    files[1].unlink()


def shards_swapped(merged: Path, files: list[Path]) -> None:
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def stale_shard(merged: Path, files: list[Path]) -> None:
    tensors = load_file(files[1])
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, files[1], metadata={"format": "pt"})


def index_misses_a_tensor(merged: Path, files: list[Path]) -> None:
    edit(merged / safetensors_io.INDEX, lambda index: index["weight_map"].pop(Q0))


@pytest.mark.parametrize("fault", [shard_lost, shards_swapped, stale_shard, index_misses_a_tensor], ids=lambda f: f.__name__)
def test_shards_and_their_index_are_proved_too(fault: Callable[..., None], tmp_path: Path) -> None:
    _, case = merged_well(tmp_path, replace(EVERYTHING, shard="100KB"))
    fault(tmp_path / "merged", sorted((tmp_path / "merged").glob("*.safetensors")))
    assert_fails(case, tmp_path / "merged")


# --- in a run


def test_the_report_says_what_was_merged_from_what_and_how_well(tmp_path: Path) -> None:
    merged_well(tmp_path, EVERYTHING)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["holds"]
    assert report["faults"] == []
    assert {name: list(files) for name, files in report["sha256"].items()} == {
        "base": ["model.safetensors"], "adapter": ["adapter_model.safetensors"], "merged": ["model.safetensors"]}  # fmt: skip
    assert report["tensors"] == len(load_file(tmp_path / "merged" / "model.safetensors"))
    assert all(0 <= each["of_allowed"] <= 1 for each in report["worst"])
    assert 0 < report["logits"]["error"] <= report["logits"]["tolerance"]


LORA = ["loss=sft", "peft=lora", "train.steps=2", "train.batch_size=8", "checkpoint.every=null", "optim.lr=1e-2"]


@pytest.mark.parametrize("fault", ["wrong", "crash"])
def test_a_run_whose_merge_is_wrong_fails_and_keeps_the_adapter(
    fault: str, configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = "halos.checkpoint.preflight.check_merge_once"  # it would be refused before the first step
    monkeypatch.setattr(passes, lambda *_: None)
    if fault == "wrong":
        subtracted(monkeypatch)
    else:
        monkeypatch.setattr(merge, "write_sharded", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    assert run(configure(*LORA), []) == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "kept in FINAL/adapter" in result["reason"]
    assert ("off by" if fault == "wrong" else "no space left") in result["reason"]
    final = tmp_path / "run" / "FINAL"
    assert list((final / "adapter").glob("*.safetensors"))
    assert not list(final.glob("*.safetensors"))
    assert not (final / "config.json").exists()


def test_a_run_that_could_not_be_merged_is_refused_before_its_first_step(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "COVERED", lora.COVERED - {"use_dora"})
    with pytest.raises(UserError, match=r"cannot merge: use_dora=True is not covered"):
        run(configure(*LORA, "peft.use_dora=true"), [])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_is_not_to_be_merged_may_train_what_cannot_be(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "COVERED", lora.COVERED - {"use_dora"})
    assert run(configure(*LORA, "peft.use_dora=true", "checkpoint.merge_lora=false"), []) == 0
    assert list((tmp_path / "run" / "FINAL" / "adapter").glob("*.safetensors"))


def test_what_pads_the_last_piece_of_a_parameter_is_none_of_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 cuts 7 values for 3 processes into pieces of 3; what stands behind the end is whatever its memory held."""
    values = torch.randn(7, generator=torch.Generator().manual_seed(1))
    behind = torch.cat([values, torch.tensor([9.0, -4.0])])
    found = 0
    for rank in range(3):
        parameter = nn.Parameter(torch.empty(0))
        parameter.ds_tensor, parameter.ds_numel = behind[3 * rank : 3 * rank + 3], 7
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert is_shard(parameter)
        found += probe.bit_sum(local_part(parameter))
    assert found == probe.bit_sum(values)
