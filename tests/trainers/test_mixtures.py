"""Mixtures of experts from the first step to FINAL: packed, trained by LoRA on their experts or whole, saved, merged, loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from halos.data.collate import pack
from halos.logps.model import bare
from halos.trainers.base import Trainer
from tests.mixtures import EXPERTS, FAMILIES, build

SHORT = ["train.steps=3", "train.batch_size=6", "train.microbatch_size=4", "optim.lr=1e-2", "train.eval_at_start=false",
         "train.eval_every=null", "checkpoint.every=2"]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {} if request.param == "DeepseekV3" else {"output_router_logits": True}
    return build(request.param, tmp_path_factory.mktemp("models") / request.param, **settings)


def loaded(path: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def test_a_packed_sequence_gives_the_log_probs_of_the_sequence_alone(mixture: Path, trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=sft", f"model.name_or_path={mixture}", "peft=lora", EXPERTS)
    for parameter in made.run.module.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape) if parameter.requires_grad else 0.0
    rows = made.rows([made.train.rows[number] for number in range(4)])
    made.run.module.eval()
    with torch.no_grad():
        together = made.run.module(pack(rows))
        for number, row in enumerate(rows):
            alone = made.run.module(pack([row]))
            count = int(alone.mask.sum())
            torch.testing.assert_close(together.values[number, :count], alone.values[0, :count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_lora_on_experts_trains_and_its_merge_is_proved(loss: str, mixture: Path, trainer: Callable[..., Trainer]) -> None:
    made = trainer(f"loss={loss}", f"model.name_or_path={mixture}", "peft=lora", EXPERTS, *SHORT)
    before = {name: value.clone() for name, value in made.run.model.state_dict().items()}
    made.fit()
    after = made.run.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("experts.lora_B" in name for name in moved)
    assert any("experts.base_layer.lora_B" in name for name in moved)
    assert all(".lora_" in name for name in moved)  # the router's bias, say, is no parameter and stays
    assert made.run.failure is None
    final = made.run.directory.final
    assert json.loads((final / "merge_report.json").read_text())["holds"]
    names = set(load_file(final / "model.safetensors"))
    assert names == set(load_file(mixture / "model.safetensors"))
    ids = torch.randint(3, 90, (1, 24))
    model = bare(made.run.model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        wanted, found = model.eval()(input_ids=ids).logits, loaded(final)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if made.router is not None:
        assert made.run.last_train["router_aux_loss"] > 1


def test_a_mixture_that_is_trained_whole_is_saved_as_the_hub_has_it(mixture: Path, trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=sft", f"model.name_or_path={mixture}", *SHORT)
    made.fit()
    final = made.run.directory.final
    files, base = load_file(final / "model.safetensors"), load_file(mixture / "model.safetensors")
    assert files.keys() == base.keys()
    again = loaded(final).state_dict()
    mine = bare(made.run.model).state_dict()
    assert all(torch.equal(again[name], value) for name, value in mine.items())
    assert not torch.equal(files[next(name for name in files if ".experts.1." in name)],
                           base[next(name for name in files if ".experts.1." in name)])  # fmt: skip
    biases = [name for name in files if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(files[name], base[name]) for name in biases)


def test_a_run_resumes_with_its_experts_exactly(mixture: Path, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    words = ["loss=sft", f"model.name_or_path={mixture}", "peft=lora", EXPERTS, *SHORT, "checkpoint.merge_lora=false"]
    whole = trainer(*words, "exp_name=whole")
    whole.fit()
    again = trainer(*words, "exp_name=again", f"peft.init_from={tmp_path}/whole/FINAL/adapter")
    for (name, mine), theirs in zip(again.run.model.named_parameters(), whole.run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
