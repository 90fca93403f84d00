"""Process reward models: logits at ends of steps are those of transformers' own token classifier, and so is the gradient."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from halos.data.collate import pack
from halos.examples import Completion, PackRow
from halos.logps import plan
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import ProcessRewardModel
from halos.losses.prm import prm
from halos.reward_kind import RewardKind
from halos.types import Item, StepScores

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": GQA, "Qwen2": {"num_key_value_heads": 2}, "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "Gemma2": {**GQA, "sliding_window": 8, "attn_logit_softcapping": 2.0},
}  # fmt: skip
# of each row its prompt and where steps end: two have one prompt, and a branch ends a step at its first token
ENDS = ((0, "0001001"), (1, "10101"), (1, "00100001"), (0, "1111"))
LABELS = ((1.0, 0.0), (0.25, 1.0, 0.0), (1.0, 0.5), (0.0, 1.0, 1.0, 0.75))


def build(name: str, attention: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ARCHITECTURES[name], **more}, num_labels=2)
    register()
    torch.manual_seed(0)
    model = transformers.AutoModelForTokenClassification.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.set_attn_implementation(attention)
    return model


def rows() -> list[PackRow]:
    draw = np.random.default_rng(0)
    prompts = draw.integers(3, 300, (2, 11)).astype(np.int32)
    return [(prompts[which], Completion(draw.integers(3, 300, len(ends)).astype(np.int32), np.array([c == "1" for c in ends])))
            for which, ends in ENDS]  # fmt: skip


def items() -> list[Item]:
    return [Item(prompt, (completion,), str(n), step_labels=np.array(LABELS[n], np.float32))
            for n, (prompt, completion) in enumerate(rows())]  # fmt: skip


def naive(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Cross-entropy of padded rows by transformers' own forward, and each row's logits at ends of steps."""
    whole = [torch.from_numpy(np.concatenate([prompt, done.ids])).long() for prompt, done in rows()]
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=SIZES["pad_token_id"])
    attended = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in whole], batch_first=True)
    logits = model(input_ids=ids, attention_mask=attended).logits
    ends = [np.flatnonzero(done.scored) + len(prompt) for prompt, done in rows()]
    at = [logits[n, torch.from_numpy(each)] for n, each in enumerate(ends)]
    labels = torch.tensor([label for row in LABELS for label in row])
    return nn.functional.cross_entropy(torch.cat(at), torch.stack([1 - labels, labels], -1)), at


@pytest.mark.parametrize(("name", "share"), [("Llama", True), ("Qwen2", False), ("GPT2", False), ("Gemma2", True)])
def test_logits_and_gradient_are_those_of_the_padded_token_classifier(name: str, share: bool) -> None:
    model, plain = build(name, SEGMENTS), build(name, "eager")
    module, (wanted, at) = ProcessRewardModel(model), naive(plain)
    assert module.plan.is_packed
    output = module(pack(rows(), share=share and module.plan.shares))
    assert output.shape == (4, 4, 2)
    for row, own in zip(output, at, strict=True):
        assert torch.allclose(row[: len(own)], own, atol=1e-5)
        assert not row[len(own) :].any()
    loss = prm(StepScores.of(output, items()))
    mean = loss.values.sum() / 11
    assert mean.item() == pytest.approx(wanted.item(), abs=1e-6)
    mean.backward(), wanted.backward()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, key
        assert torch.allclose(mine.grad, theirs.grad, atol=2e-6), key


@pytest.mark.parametrize("share", [True, False])
def test_tokens_of_neighbours_change_not_one_bit(share: bool) -> None:
    module, changed = ProcessRewardModel(build("Llama", SEGMENTS)), rows()
    before = module(pack(rows(), share=share))
    for n in (0, 2):
        changed[n] = changed[n][0], Completion((changed[n][1].ids + 7) % 290 + 3, changed[n][1].scored)
    after = module(pack(changed, share=share))
    assert torch.equal(after[[1, 3]], before[[1, 3]])
    assert not torch.equal(after[[0, 2]], before[[0, 2]])


def test_only_ends_of_steps_go_through_dropout_and_head() -> None:
    module, seen = ProcessRewardModel(build("Llama", SEGMENTS, classifier_dropout=0.5)), list[Any]()
    module.model.get_submodule("score").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module.eval()(pack(rows(), share=True))
    module.train()(pack(rows(), share=True))
    assert [each.shape for each in seen] == 2 * [(11, 64)]
    share_of_zeros = (seen[1] == 0).float().mean().item()
    assert not (seen[0] == 0).any()
    assert 0.4 < share_of_zeros < 0.6


def test_a_head_that_is_not_read_by_itself_has_the_model_called_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """`classifier` is the head's name in older architectures; one that does more than a layer has is read as a whole."""
    assert plan.plan_for(build("GPT2", "eager").config, reward=RewardKind.PROCESS, attention=SEGMENTS).head == "layer"
    model = build("Llama", "eager")
    plan.remember(model, plan.ForwardPlan(None, "whole", "said so"))
    output = ProcessRewardModel(model)(pack(rows()))
    for row, own in zip(output, naive(model)[1], strict=True):
        assert torch.allclose(row[: len(own)], own, atol=1e-5)
