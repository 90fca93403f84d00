"""A mixture's balancing loss: transformers' own, and the same however a global batch is split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from halos.data.collate import pack
from halos.errors import UserError
from halos.logps.model import bare
from halos.trainers.base import Trainer
from tests.mixtures import EXPERTS, build
from tests.trainers.test_exact_step import relative, step

BATCH = np.arange(11)
HALF: dict[str, dict[str, Any]] = {  # weighs the loss by a half, as each family says so
    "Mixtral": {"router_aux_loss_coef": 0.5},
    "Dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                            "moe_loss_weight": 0.5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("Mixtral", tmp_path_factory.mktemp("models") / "mixtral", output_router_logits=True, **HALF["Mixtral"])


@pytest.mark.parametrize(
    ("loss", "peft"),
    [("sft", ["peft=none"]), ("dpo", ["peft=lora", EXPERTS]), ("kto", ["peft=lora"])],
)
def test_microbatches_of_any_size_balance_the_same_batch(
    loss: str, peft: list[str], trainer: Callable[..., Trainer], mixtral: Path
) -> None:
    common = [f"loss={loss}", *peft, f"model.name_or_path={mixtral}", "train.max_grad_norm=null", "train.batch_size=11"]
    results = []
    for size in (11, 4, 1):
        made = trainer(*common, f"train.microbatch_size={size}", f"exp_name=run{size}",
                       f"train.activation_checkpointing={'true' if size == 4 else 'false'}")  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        for parameter in made.run.module.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        results.append((*step(made, BATCH), made.step(BATCH)["router_aux_loss"]))
    (_, gradient, (total, count)), *others = results
    assert total / count > 1.9  # it is the number of experts chosen where they are chosen alike, and more where not
    for _, other, (mine, passes) in others:
        assert relative(other, gradient) < 5e-6
        assert mine / passes == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("family", HALF)
def test_it_is_what_transformers_adds(trainer: Callable[..., Trainer], tmp_path: Path, family: str) -> None:
    """The gradient with the loss less the one without is that of transformers' own function over one padded batch."""
    directory, gradients = build(family, tmp_path / "mixture", output_router_logits=True, **HALF[family]), []
    for weight in ("null", "0"):
        made = trainer("loss=sft", f"model.name_or_path={directory}", "train.max_grad_norm=null", "train.batch_size=11",
                       "train.microbatch_size=3", f"train.router_aux_loss={weight}", f"exp_name=w{weight}")  # fmt: skip
        gradients.append(step(made, BATCH)[1])
    rows = made.rows([made.train.rows[int(row)] for row in BATCH])
    sequences = pack(rows).ids.split(pack(rows).lengths)
    width = max(map(len, sequences))
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in sequences])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in sequences])
    model = bare(made.run.model)
    model.set_attn_implementation("eager")
    logits = model.base_model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    theirs = 0.5 * load_balancing_loss_func(logits, 4, 2, mask)
    wanted = torch.autograd.grad(theirs, [*model.parameters()], materialize_grads=True)  # the head has none
    flat = torch.cat([gradient.flatten() for gradient in wanted])
    assert relative(gradients[0] - gradients[1], flat) < 1e-4  # a difference of two gradients of other sizes


def test_the_config_decides_unless_a_weight_is_given(trainer: Callable[..., Trainer], mixtral: Path, tmp_path: Path) -> None:
    assert (made := trainer("loss=sft", f"model.name_or_path={mixtral}", "exp_name=a").router)
    assert made.weight == 0.5
    assert trainer("loss=sft", f"model.name_or_path={mixtral}", "train.router_aux_loss=0", "exp_name=b").router is None
    silent = build("Olmoe", tmp_path / "olmoe")  # has a coefficient, and output_router_logits is false
    assert trainer("loss=sft", f"model.name_or_path={silent}", "exp_name=c").router is None
    assert (made := trainer("loss=sft", f"model.name_or_path={silent}", "train.router_aux_loss=0.01", "exp_name=d").router)
    assert made.weight == 0.01
    assert trainer("loss=sft", "exp_name=e").router is None


def test_a_model_without_such_a_loss_is_refused_before_it_loads(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    balanced = build("DeepseekV3", tmp_path / "deepseek")
    with pytest.raises(UserError, match="no balancing loss for deepseek_v3"):
        trainer("loss=sft", f"model.name_or_path={balanced}", "train.router_aux_loss=0.01")
    with pytest.raises(UserError, match="no balancing loss for llama"):
        trainer("loss=sft", "train.router_aux_loss=0.01")


def test_router_logits_of_evaluation_and_reference_are_not_recorded(trainer: Callable[..., Trainer], mixtral: Path) -> None:
    made = trainer("loss=dpo", "peft=lora", f"model.name_or_path={mixtral}", "train.batch_size=11", "train.microbatch_size=11")
    made.step(BATCH)
    assert made.router
    tokens = int(made.train.rows.lengths[BATCH].sum())
    assert made.router.counts()[-1] == tokens * 2  # two layers, the policy's pass alone
    before = made.router._logits
    made.evaluate()
    assert made.router._logits is before
