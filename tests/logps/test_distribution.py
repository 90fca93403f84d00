"""Statistics of tokens' distributions, and their gradients, are those of the formulas in float64, through every kind of head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from halos.config.bind import bind_loss
from halos.data.collate import pack
from halos.data.dataset import Completion
from halos.errors import UserError
from halos.logps import head, linear_head
from halos.logps.distribution import Reading
from halos.logps.head import Head, from_logits
from halos.logps.linear_head import Softmax
from halos.logps.model import LanguageModel
from halos.types import Demonstration, Loss, TokenLogps

ROWS, HIDDEN, VOCABULARY, K = 23, 16, 50, 3
READINGS = [(["entropy"], False), (["log_sum_squares"], False), ([], True), (["entropy", "log_sum_squares"], True)]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reading_of(statistics: list[str], more_ids: bool) -> Reading:
    candidates = (torch.arange(ROWS)[:, None] * 5 + torch.arange(K)) % VOCABULARY
    candidates[3, 1] = candidates[3, 0]  # one id twice
    candidates[4, 0] = 4  # and the target's
    return Reading.of(torch.arange(ROWS) % VOCABULARY, statistics, candidates if more_ids else None)


def formulas(logits: Tensor, reading: Reading) -> Tensor:
    """Written without any code of the product."""
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    columns = [logps[torch.arange(len(logps)), reading.targets]]
    columns += [-(probs * logps).sum(-1)] if reading.entropy else []
    columns += [probs.pow(2).sum(-1).log()] if reading.log_sum_squares else []
    if reading.candidates is not None:
        columns += [logps[torch.arange(len(logps)), ids] for ids in reading.candidates.T]
    return torch.stack(columns, 1)


def off(mine: Tensor, truth: Tensor) -> float:
    return ((mine.double() - truth).norm() / truth.norm()).item()


def weights_of(table: Tensor) -> Tensor:
    return torch.linspace(-1, 2, table.numel(), dtype=table.dtype).reshape(table.shape)


@pytest.mark.parametrize(("statistics", "more_ids"), READINGS)
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (2.0, 4.0, 0.7)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_linear_head_gives_the_formulas_and_their_gradients(
    statistics: list[str], more_ids: bool, scale: float, softcap: float | None, temperature: float, trained: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(trained)
    double = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    reading, hidden = reading_of(statistics, more_ids), drawn(ROWS, HIDDEN, seed=1).float().requires_grad_()
    states = hidden.detach().double().requires_grad_()
    logits = double(states) * scale
    truth = formulas((logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature, reading)
    (truth * weights_of(truth)).sum().backward()
    for rows in (5, ROWS):
        layer.zero_grad()
        hidden.grad = None
        table = linear_head.read(layer, hidden, reading, Softmax(scale, softcap, temperature, rows))
        (table * weights_of(table)).sum().backward()
        assert table.shape == (ROWS, reading.width)
        for column in range(reading.width):
            assert off(table[:, column].detach(), truth[:, column].detach()) < 1e-6
        pairs = [(hidden, states), *(zip(layer.parameters(), double.parameters(), strict=True) if trained else ())]
        assert max(off(mine.grad, true.grad) for mine, true in pairs if mine.grad is not None and true.grad is not None) < 1e-6
        assert (layer.weight.grad is not None) is trained


@pytest.mark.parametrize(("statistics", "more_ids"), READINGS)
def test_any_other_head_gives_the_same_of_its_logits_and_ids_without_probability_do_no_harm(
    statistics: list[str], more_ids: bool
) -> None:
    reading, logits = reading_of(statistics, more_ids), (4 * drawn(ROWS, VOCABULARY, seed=3)).requires_grad_()
    truth = formulas(logits / 0.7, reading)
    (truth * weights_of(truth)).sum().backward()
    single = logits.detach().float().requires_grad_()
    table = from_logits(single, reading, 0.7)
    (table * weights_of(table)).sum().backward()
    assert single.grad is not None
    assert logits.grad is not None
    assert off(table.detach(), truth.detach()) < 1e-6
    assert off(single.grad, logits.grad) < 2e-6
    impossible = single.detach().clone()
    impossible[:, -1] = -torch.inf
    impossible.requires_grad_()
    table = from_logits(impossible, Reading.of(reading.targets, statistics), 0.7)
    table.sum().backward()
    assert impossible.grad is not None
    assert table.isfinite().all()
    assert impossible.grad.isfinite().all()
    assert (impossible.grad[:, -1] == 0).all()


def test_a_models_statistics_are_of_its_own_logits_with_an_adapter_on_the_head_too() -> None:
    config = transformers.LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    torch.manual_seed(0)
    inner: Any = transformers.LlamaForCausalLM(config).eval()
    rows = [(np.arange(3 + n), Completion(np.arange(4) + 7 * n, np.ones(4, bool))) for n in (0, 1)]
    for adapted in (False, True):
        if adapted:
            inner = get_peft_model(inner, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
        model = LanguageModel(inner, temperature=0.8)
        model.token_statistics = ("entropy", "log_sum_squares")
        logps = model(pack(rows))
        assert logps.entropy is not None
        assert logps.log_sum_squares is not None
        for n, (prompt, completion) in enumerate(rows):
            ids = torch.tensor([*prompt, *completion.ids])[None]
            logits = inner(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / 0.8
            truth = formulas(logits, Reading.of(ids[0, len(prompt) :], model.token_statistics))
            found = torch.stack([logps.values[n], logps.entropy[n], logps.log_sum_squares[n]], -1)
            assert off(found, truth) < 1e-6


def test_the_dropout_of_an_adapter_on_the_head_is_the_same_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    layers: Any = get_peft_model(nn.Sequential(nn.Linear(HIDDEN, VOCABULARY)), adapter)  # type: ignore[arg-type]
    mapped, hidden, reading = Head(layers, layers), drawn(ROWS, HIDDEN, seed=1).float(), reading_of(["entropy"], False)
    gradients = []
    for read in (lambda: mapped.read(hidden, reading, VOCABULARY), lambda: from_logits(mapped.logits(hidden), reading, 1.0)):
        torch.manual_seed(1)
        table = read()
        torch.manual_seed(2)  # whatever is drawn until then
        (table * weights_of(table)).sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in layers.parameters() if each.grad is not None]))
        layers.zero_grad()
    assert off(gradients[0], gradients[1].double()) < 1e-6


def test_a_gpus_chunk_is_a_part_of_its_memory_and_of_nothing_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Card:
        total_memory: int

    assert head.logits_at_once(torch.device("cpu")) == 2**25
    for memory, elements in ((85_000_000_000, 2**28), (143_000_000_000, 2**29), (8_000_000_000, 2**25)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: Card(memory))
        assert head.logits_at_once(torch.device("cuda", 0)) == elements
    assert Head.__dataclass_fields__["recomputes"].default is False, "runs that an earlier version began keep their chunks"


@dataclass(frozen=True, slots=True)
class WithEntropy(TokenLogps):
    token_statistics = ("entropy",)


def entropic(policy: WithEntropy, *, weight: float) -> Loss:
    """An entropy bonus in three lines."""
    assert policy.entropy is not None
    return Loss(-(policy.values + weight * policy.entropy) * policy.mask, {}, per="token")


@dataclass(frozen=True, slots=True)
class Misspelt(TokenLogps):
    token_statistics = ("entropie",)


def misspelt(policy: Misspelt) -> Loss:
    return Loss(-policy.sum, {})


def test_a_loss_that_declares_the_entropy_trains_with_its_gradient_and_a_name_that_is_none_is_refused(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    words = ["loss=sft", "plugins=[test_distribution]", "loss._target_=test_distribution.entropic", "+loss.weight=0.5"]
    made = trainer(*words, "train.batch_size=4", "train.steps=1")
    made.run.module.train()
    indices = made.order.batch(0)
    (microbatch,) = made._microbatches(made.train, indices)
    loss = made._loss(microbatch, None, 4)
    loss.values.sum().backward()
    found = torch.cat([each.grad.flatten() for each in made.run.module.parameters() if each.grad is not None])
    made.run.module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for item in microbatch.items:
        (completion,) = item.completions
        ids = torch.tensor([*item.prompt, *completion.ids])[None]
        with made.run.module.plainly():
            logits = made.run.model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1].double()
        table = formulas(logits, Reading.of(ids[0, len(item.prompt) :], ("entropy",)))[torch.from_numpy(completion.scored)]
        total = total - table[:, 0].sum() - 0.5 * table[:, 1].sum()
    total.backward()
    wanted = torch.cat([each.grad.flatten() for each in made.run.module.parameters() if each.grad is not None])
    assert off(loss.values.sum().detach(), total.detach()) < 1e-6
    assert off(found, wanted.double()) < 5e-6
    with pytest.raises(UserError, match="token_statistics has entropie: it may have entropy, log_sum_squares"):
        bind_loss({"_target_": "test_distribution.misspelt"}, ["test_distribution"])


def test_statistics_are_split_and_detached_with_the_log_probs() -> None:
    values, mask = drawn(4, 2, seed=0).requires_grad_(), torch.ones(4, 2).bool()
    logps = TokenLogps(values, mask, entropy=2 * values, candidates=values[..., None])
    first, rest = logps.split(1)
    assert Demonstration is TokenLogps.example
    assert first.entropy is not None
    assert rest.candidates is not None
    assert (first.entropy.shape, rest.candidates.shape, rest.log_sum_squares) == ((1, 2), (3, 2, 1), None)
    detached = logps.detach()
    assert detached.entropy is not None
    assert not detached.entropy.requires_grad
    assert detached.log_sum_squares is None
