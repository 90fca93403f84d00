"""Faults of a forward pass, listed before the proof was written: each is injected, and the proof must detect it.

 1 the border between rows one token late            15 its first token left out
 2 no border: one row reads on from the other        16 the head reads the state after the one that predicts
 3 a leak of a billionth                             17 the temperature forgotten
 4 positions that go on over the border              18 logits multiplied by the temperature
 5 positions that start at 1                         19 the head's bias forgotten
 6 a window of one token more                        20 the head's adapter forgotten
 7 key heads repeated in the wrong order             21 rows given back in another order
 8 attention without its scale                       22 the adapter left on in the reference
 9 attention's soft cap dropped                      23 a trained bias left in the reference
10 sinks dropped                                     24 the adapter left off after the reference
11 the logits' soft cap dropped                      25 a value read one token late
12 the logits' scale inverted                        26 a score read at the last token but one
13 only some of the vocabulary in the softmax        27 a score read at padding
14 a prompt token scored                             28 rows taken one by one, a token short
29 the transform before the last layer skipped       30 log-probs in bfloat16
31 a branch that reads the one before it             32 a branch whose window begins anew after the prompt
33 a branch whose positions go on after another's    34 a branch predicted by the last token of another
35 branches given back in the order of their trees   36 a branch that does not read its prompt's last token
37 a leak of a billionth into the branch after another
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from halos.logps import attention, head, hidden, linear_head, model, modes
from halos.logps.attention import SEGMENTS
from halos.prove import checks, small_copy
from halos.prove.small_copy import SAME_PROMPT as SAME
from halos.reward_kind import RewardKind
from halos.types import Sequences, Tree

Patch = pytest.MonkeyPatch
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 16}
BASES: dict[str, dict[str, Any]] = {
    "Llama": GQA,
    "Qwen2": {"num_key_value_heads": 2},
    "Gemma2": {**GQA, "sliding_window": 8, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 2.0},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "GptOss": {**GQA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Phi": {"num_key_value_heads": 4},
    "ModernBertDecoder": {},
    "GPT2": {},  # whose positions are absolute: rotary ones cannot tell one offset from another
    "Lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": "none",
        "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [],
        "target_parameters": []}  # fmt: skip


def of(base: str, **more: Any) -> small_copy.ForwardSpec:
    labels = (more.get("reward") or RewardKind.OUTCOME).labels
    config = getattr(transformers, f"{base}Config")(**SIZES, **BASES[base], **labels)
    plain = small_copy.ForwardSpec(
        config=config, peft=None, attention=SEGMENTS, reward=None, valued=False, refers=False, longest=None,
        dtype=torch.float32, autocast=False, device=torch.device("cpu"), temperature=0.7,
    )  # fmt: skip
    return replace(plain, **more)


def around(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function or method by `change(real, *arguments)`."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **named: change(real, *given, **named))


def batches(patch: Patch, change: Callable[[Sequences], Sequences]) -> None:
    around(patch, small_copy, "pack", lambda real, rows, **named: change(real(rows, **named)))


def border_late(patch: Patch) -> None:
    def attend(real: Any, *given: Any, trees: tuple[Tree, ...], **named: Any) -> Any:
        if len(trees) > 1:
            (first, *branches), (second, *others), *rest = trees
            trees = ((first + 1, *branches), (second - 1, *others), *rest)
        return real(*given, trees=trees, **named)

    patched(patch, attend)


def patched(patch: Patch, attend: Callable[..., Any]) -> None:
    """Replace the attention, which every call of plan_for registers again."""
    around(patch, attention, "attend_by_tree", attend)


def trees(patch: Patch, change: Callable[[tuple[Tree, ...]], tuple[Tree, ...]]) -> None:
    patched(patch, lambda real, *given, trees, **named: real(*given, trees=change(trees), **named))


def no_border(patch: Patch) -> None:
    trees(patch, lambda given: (tuple([sum(map(sum, given))]),))


def leak(patch: Patch) -> None:
    around(patch, hidden, "_packed", lambda real, *given: (states := real(*given)) + 1e-9 * states.mean())


def positions_go_on(patch: Patch) -> None:
    batches(patch, lambda batch: replace(batch, positions=torch.arange(len(batch.ids))))


def positions_from_one(patch: Patch) -> None:
    batches(patch, lambda batch: replace(batch, positions=batch.positions + 1))


def wide_window(patch: Patch) -> None:
    around(
        patch,
        attention,
        "_causal",
        lambda real, queries, keys, window, device: real(queries, keys, window and window + 1, device=device),
    )


def heads_in_turn(patch: Patch) -> None:
    def attend(real: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        return real(module, query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), *given, **named)

    patched(patch, attend)


def no_scale(patch: Patch) -> None:
    patched(patch, lambda real, *given, **named: real(*given, **{**named, "scaling": 1.0}))


def no_soft_cap_in_attention(patch: Patch) -> None:
    patched(patch, lambda real, *given, **named: real(*given, **{**named, "softcap": None}))


def no_sinks(patch: Patch) -> None:
    patched(patch, lambda real, *given, **named: real(*given, **{**named, "s_aux": None}))


def heads(patch: Patch, change: Callable[[Any], Any]) -> None:
    real = head.Head.of.__func__
    of = classmethod(lambda cls, *given, **named: change(real(cls, *given, **named)))
    patch.setattr(model.Head, "of", of)


def no_soft_cap(patch: Patch) -> None:
    heads(patch, lambda made: replace(made, softcap=None))


def scale_inverted(patch: Patch) -> None:
    heads(patch, lambda made: replace(made, scale=1 / made.scale))


def logits(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    around(patch, head.Head, "logits", lambda real, self, states: change(real(self, states)))


def part_of_the_vocabulary(patch: Patch) -> None:
    logits(patch, lambda said: torch.cat([said[:, 16:], torch.full_like(said[:, :16], -torch.inf)], -1).roll(16, -1))


def in_bfloat16(patch: Patch) -> None:
    logits(patch, lambda said: said.bfloat16().float())


def prompt_scored(patch: Patch) -> None:
    def earlier(real: Any, rows: Any, **named: Any) -> Any:
        return real([(prompt[:-1], replace(done, ids=_before(prompt, done.ids), scored=_before([True], done.scored)))
                     for prompt, done in rows], **named)  # fmt: skip

    around(patch, small_copy, "pack", earlier)


def _before(one: Any, rest: Any) -> Any:
    return torch.cat([torch.as_tensor(one[-1:]), torch.as_tensor(rest)]).numpy()


def first_left_out(patch: Patch) -> None:
    def later(real: Any, rows: Any, **named: Any) -> Any:
        return real([(prompt, replace(done, scored=_before([False], done.scored[1:]))) for prompt, done in rows], **named)

    around(patch, small_copy, "pack", later)


def state_after(patch: Patch) -> None:
    batches(patch, lambda batch: replace(batch, sources=batch.sources + 1))


def no_temperature(patch: Patch) -> None:
    heads(patch, lambda made: replace(made, temperature=1.0))


def temperature_inverted(patch: Patch) -> None:
    heads(patch, lambda made: replace(made, temperature=1 / made.temperature))


def of_the_layer(patch: Patch, change: Callable[[Any, Tensor], Tensor]) -> None:
    def said(_: Any, self: Any, states: Tensor) -> Tensor:
        return change(self.layer, states)

    around(patch, head.Head, "logits", said)


def no_bias(patch: Patch) -> None:
    of_the_layer(patch, lambda layer, states: states @ layer.weight.T)


def no_adapter_on_the_head(patch: Patch) -> None:
    around(patch, linear_head, "computing", lambda real, layer: getattr(layer, "original_module", layer))


def rows_in_another_order(patch: Patch) -> None:
    def reversed_(real: Any, flat: Tensor, batch: Sequences) -> Tensor:
        return real(flat, batch).flip(0)

    around(patch, model, "in_rows", reversed_)


@contextmanager
def nothing(_: nn.Module) -> Iterator[None]:
    yield


def adapter_left_on(patch: Patch) -> None:
    patch.setattr(checks, "adapter_off", nothing)


def bias_left_in(patch: Patch) -> None:
    patch.setattr(modes, "with_values", lambda *_: nothing(nn.Module()))


def adapter_left_off(patch: Patch) -> None:
    @contextmanager
    def off(module: nn.Module) -> Iterator[None]:
        for layer in module.modules():
            if hasattr(layer, "_disable_adapters"):
                layer._disable_adapters = True
        yield

    patch.setattr(checks, "adapter_off", off)


def value_late(patch: Patch) -> None:
    def read(_: Any, self: Any, batch: Sequences) -> Any:
        states = self.hidden(batch)
        values = self.value_head(states[batch.sources + 1].float()).sum(-1)
        return model.Acted(self.logps(states[batch.sources], batch), model.in_rows(values, batch))

    around(patch, model.ActorCritic, "read", read)


def score_early(patch: Patch) -> None:
    around(patch, model, "last_tokens", lambda real, *given: real(*given) - 1)


def score_at_padding(patch: Patch) -> None:
    around(patch, model, "last_tokens", lambda real, batch, padding: real(batch, None))


def step_early(patch: Patch) -> None:
    around(patch, model, "own_tokens", lambda real, batch: batch.sources)


def step_before_its_branch(patch: Patch) -> None:
    around(patch, model, "own_tokens", lambda real, batch: batch.sources + 1)


def labels_exchanged(patch: Patch) -> None:
    around(patch, model, "scores_of", lambda real, *given: real(*given).flip(-1))


def a_token_short(patch: Patch) -> None:
    def row(real: Any, backbone: nn.Module, ids: Tensor) -> Tensor:
        states = real(backbone, ids[1:])
        return torch.cat([states[:1], states])

    around(patch, hidden, "_of_row", row)


def no_transform(patch: Patch) -> None:
    around(patch, head, "own_logits", lambda _, inner, states: inner.get_output_embeddings()(states))


def branch_reads_a_branch(patch: Patch) -> None:
    trees(patch, lambda given: tuple((sum(tree),) for tree in given))


def window_begins_anew(patch: Patch) -> None:
    def causal(_: Any, queries: int, keys: int, window: int | None, *, device: torch.device) -> Tensor:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        if window is not None:
            mask[:, keys - queries :] &= torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1 - window)
        return mask

    around(patch, attention, "_causal", causal)


def branches(patch: Patch, change: Callable[[Sequences], Sequences]) -> None:
    """Change packed rows of which some share a prompt."""
    batches(patch, lambda batch: change(batch) if len(batch.trees) < len(batch.leaves) else batch)


def branch_positions_go_on(patch: Patch) -> None:
    def later(batch: Sequences) -> Sequences:
        trunk, first, second = batch.trees[SAME[0]]
        start = batch.trees[0][0] + trunk + first
        positions = batch.positions.clone()
        positions[start : start + second] += first
        return replace(batch, positions=positions)

    branches(patch, later)


def predicted_by_another_branch(patch: Patch) -> None:
    def earlier(batch: Sequences) -> Sequences:
        first, last = ((batch.rows == row).nonzero()[:, 0] for row in SAME)
        return replace(batch, sources=batch.sources.index_fill(0, first[0], int(batch.sources[last[-1]])))

    branches(patch, earlier)


def branches_in_tree_order(patch: Patch) -> None:
    branches(patch, lambda batch: replace(batch, rows=torch.tensor([batch.leaves.index(int(row)) for row in batch.rows])))


def prompt_cut_for_a_branch(patch: Patch) -> None:
    def attend(real: Any, settings: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        earlier = key.shape[2] - query.shape[2]
        if not earlier:
            return real(settings, query, key, value)
        keys, values = (torch.cat([each[:, :, : earlier - 1], each[:, :, earlier:]], 2) for each in (key, value))
        return real(settings, query, keys, values)

    around(patch, attention._Settings, "attend", attend)


def leak_into_a_later_branch(patch: Patch) -> None:
    def leaking(real: Any, backbone: Any, attention_: str, batch: Sequences) -> Tensor:
        states = real(backbone, attention_, batch)
        start = batch.trees[0][0]
        trunk, first, second = batch.trees[SAME[0]]
        before, own = states[start + trunk :][:first], torch.zeros(len(states), 1)
        own[start + trunk + first :][:second] = 1e-9
        return states + own * before.mean()

    def shared(real: Any, backbone: Any, attention_: str, batch: Sequences) -> Tensor:
        is_shared = len(batch.trees) < len(batch.leaves)
        return leaking(real, backbone, attention_, batch) if is_shared else real(backbone, attention_, batch)

    around(patch, hidden, "_packed", shared)


FAULTS: list[tuple[Callable[[Patch], None], str, dict[str, Any]]] = [
    (border_late, "Llama", {}),
    (no_border, "Llama", {}),
    (leak, "Llama", {}),
    (positions_go_on, "GPT2", {}),
    (positions_from_one, "GPT2", {}),
    (wide_window, "Gemma2", {}),
    (heads_in_turn, "Llama", {}),
    (no_scale, "Llama", {}),
    (no_soft_cap_in_attention, "Gemma2", {}),
    (no_sinks, "GptOss", {}),
    (no_soft_cap, "Gemma2", {}),
    (scale_inverted, "Granite", {}),
    (part_of_the_vocabulary, "Llama", {}),
    (in_bfloat16, "Llama", {}),
    (prompt_scored, "Llama", {}),
    (first_left_out, "Llama", {}),
    (state_after, "Llama", {}),
    (no_temperature, "Llama", {}),
    (temperature_inverted, "Llama", {}),
    (no_bias, "Phi", {}),
    (no_adapter_on_the_head, "Llama", {"peft": {**LORA, "modules_to_save": ["lm_head"]}}),
    (rows_in_another_order, "Llama", {}),
    (adapter_left_on, "Llama", {"peft": LORA, "refers": True}),
    (bias_left_in, "Qwen2", {"peft": {**LORA, "bias": "all"}, "refers": True}),
    (adapter_left_off, "Llama", {"peft": LORA, "refers": True}),
    (value_late, "Llama", {"valued": True}),
    (score_early, "Llama", {"reward": RewardKind.OUTCOME}),
    (score_at_padding, "Llama", {"reward": RewardKind.OUTCOME}),
    (step_early, "Llama", {"reward": RewardKind.PROCESS}),
    (step_before_its_branch, "Llama", {"reward": RewardKind.PROCESS}),
    (labels_exchanged, "Llama", {"reward": RewardKind.PROCESS}),
    (a_token_short, "Lfm2", {}),
    (no_transform, "ModernBertDecoder", {}),
    (branch_reads_a_branch, "Llama", {}),
    (window_begins_anew, "Gemma2", {}),
    (branch_positions_go_on, "GPT2", {}),
    (predicted_by_another_branch, "Llama", {}),
    (branches_in_tree_order, "Llama", {}),
    (prompt_cut_for_a_branch, "Llama", {}),
    (leak_into_a_later_branch, "Llama", {}),
]
CASES = {fault.__name__: (fault, base, more) for fault, base, more in FAULTS}


def wrong(asked: small_copy.ForwardSpec) -> list[checks.Check]:
    return [check for check in checks.prove(asked)[1] if not check.holds]


RIGHT = {f"{base} {more}": of(base, **more) for _, base, more in FAULTS}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", RIGHT)
def test_without_a_fault_all_checks_hold(name: str, autocast: bool) -> None:
    assert not wrong(replace(RIGHT[name], autocast=autocast))


def choose_plans(asked: small_copy.ForwardSpec) -> None:
    """As they are without the fault: this process keeps those of the architecture, and of the small model with its adapter."""
    small_copy.SmallCopy(asked)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_an_injected_fault_is_detected(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, base, more = CASES[name]
    asked = of(base, **more, autocast=autocast)
    choose_plans(asked)
    inject(monkeypatch)
    assert wrong(asked)


def test_no_fault_is_listed_twice() -> None:
    assert len(CASES) == len(FAULTS) >= 30
