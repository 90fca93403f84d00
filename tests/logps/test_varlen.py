"""One kernel for all packed sequences: its arguments, the calls that it takes, and the trial that decides whether it is used."""

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from halos.data.collate import pack
from halos.errors import UserError
from halos.examples import Completion
from halos.inspection import activations
from halos.logps import attention, plan, varlen, varlen_trial
from halos.logps.attention import SEGMENTS, VARLEN, attend_by_tree, attend_in_one_call
from halos.logps.hidden import PACKS
from halos.logps.model import LanguageModel
from halos.models.load import attention as chosen
from halos.types import Tree

CPU, GPU = torch.device("cpu"), torch.device("cuda")

LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=90
)

Kernel = Callable[..., Tensor]


# --- a stand-in for the kernel, by its documentation -------------------------------------------------------------------


def stand_in(
    query: Tensor,  # (tokens, heads, size)
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    upper_left: bool = False,
) -> Tensor:
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends.shape == key_ends.shape
    assert (int(query_ends[0]), int(query_ends[-1])) == (0, len(query))
    assert (int(key_ends[0]), int(key_ends[-1])) == (0, len(key)) == (0, len(value))
    assert longest_query == max(int(end - start) for start, end in pairwise(query_ends))
    assert longest_key == max(int(end - start) for start, end in pairwise(key_ends))
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        at = torch.arange(q1 - q0)[:, None] + (0 if upper_left else (k1 - k0) - (q1 - q0))  # the key at each query's own place
        keys = torch.arange(k1 - k0)[None]
        visible = (keys <= at + right) & ((keys >= at - left) if left >= 0 else True)
        heads = []
        for head in range(query.shape[1]):
            of = head // (query.shape[1] // key.shape[1])
            logits = query[q0:q1, head].double() @ key[k0:k1, of].double().T * scale
            heads.append(logits.masked_fill(~visible, float("-inf")).softmax(-1) @ value[k0:k1, of].double())
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs).to(query.dtype)


@pytest.fixture(autouse=True)
def _no_trial_is_remembered() -> Iterator[None]:
    for made in (varlen.layout_of, varlen_trial.why_not):
        made.cache_clear()
    yield
    for made in (varlen.layout_of, varlen_trial.why_not):
        made.cache_clear()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Put a kernel in the place of torch's, for CPUs and all dtypes."""

    def put(new: Kernel) -> None:
        monkeypatch.setattr(varlen, "kernel", lambda: new)
        monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
        monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16, torch.float32, torch.float64))

    return put


# --- output and gradients ----------------------------------------------------------------------------------------------


def naive(inputs: list[Tensor], trees: tuple[Tree, ...], window: int | None) -> Tensor:
    """Attention over the whole row of each branch, prompt and branch, in float64: (tokens, heads, size)."""
    query, key, value = (each[0].double() for each in inputs)
    output, start = torch.zeros_like(query), 0
    for trunk, *branches in trees:
        end = start + trunk
        for branch in branches or [0]:
            row = [*range(start, start + trunk), *range(end, end + branch)]
            end += branch
            count, groups = len(row), len(query) // len(key)
            distance = torch.arange(count)[:, None] - torch.arange(count)[None]
            hidden = (distance < 0) | (distance >= (count if window is None else window))
            for head in range(len(query)):
                logits = query[head, row] @ key[head // groups, row].T * query.shape[-1] ** -0.5
                whole = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ value[head // groups, row]
                new = torch.zeros_like(output)
                new[head, row[trunk:]] = whole[trunk:]
                if not output[head, row[:trunk]].any():  # the prompt's own are the same in every row
                    new[head, row[:trunk]] = whole[:trunk]
                output = output + new
        start = end
    return output.transpose(0, 1)


def with_gradients(of: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = of(leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), leaves)]


TREES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)


@given(
    trees=TREES,
    window=st.none() | st.integers(1, 12),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_output_and_gradients_are_those_of_whole_rows(
    trees: tuple[Tree, ...], window: int | None, heads: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator, total = torch.Generator().manual_seed(seed), sum(map(sum, trees))
    made = [torch.randn(1, total, n, 8, generator=generator).transpose(1, 2).to(dtype) for n in (heads[0], heads[1], heads[1])]
    calls = list[int]()

    def counted(*given: Any, **more: Any) -> Tensor:
        calls.append(1)
        return stand_in(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "kernel", lambda: counted)
        patch.setattr(varlen, "DEVICES", ("cpu",))
        patch.setattr(varlen, "DTYPES", (torch.float32, torch.float64))
        ours = with_gradients(
            lambda of: attend_in_one_call(nn.Module(), *of, None, sliding_window=window, trees=trees)[0][0], made
        )
    assert calls == [1]
    for mine, exact in zip(ours, with_gradients(lambda of: naive(of, trees, window), made), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - exact.double()).norm() <= 1e-6 * exact.double().norm() + 1e-12


def test_a_layout_by_hand() -> None:
    layout = varlen.layout_of(((3, 2, 4), (5,), (6, 1), (2, 7, 1, 3)), CPU)
    assert layout.query_ends.tolist() == [0, 5, 9, 14, 21, 30, 31, 34]
    assert layout.key_ends.tolist() == [0, 5, 12, 17, 24, 33, 36, 41]
    assert (layout.longest_query, layout.longest_key) == (9, 9)
    assert layout.pieces == [3, 2, 4, 5, 7, 2, 7, 1, 3]
    assert layout.order == [0, 1, 0, 2, 3, 4, 5, 6, 5, 7, 5, 8]
    keys = torch.arange(34.0)[:, None, None]
    read = varlen._in_sequences(keys, layout)
    assert read[:12].flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    alone = varlen.layout_of(((5,), (6, 1), (4,)), CPU)
    assert varlen._in_sequences(keys, alone) is keys, "nothing is copied where no prompt is shared"
    assert (alone.longest_query, alone.longest_key) == (7, 7)


def test_sequence_ends_are_made_once_for_all_layers_and_outlive_an_evaluation(
    kernel: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = list[Tensor](), list[tuple[Tensor, Tensor]]()
    copy = varlen.to_device

    def recorded(*given: Any, **more: Any) -> Tensor:
        seen.append((given[3], given[4]))
        return stand_in(*given, **more)

    monkeypatch.setattr(varlen, "to_device", lambda values, device: made.append(values) or copy(values, device))
    kernel(recorded)
    trees = ((3, 2, 4), (5,))
    inputs = varlen_trial.random_inputs(trees, 0, 8)
    with torch.device("meta"):  # as where a model is loaded without weights
        varlen.layout_of(trees, CPU)
    varlen.layout_of.cache_clear()
    made.clear()
    with torch.inference_mode():
        attend_in_one_call(nn.Module(), *inputs, None, trees=trees)
    for _ in range(3):
        attend_in_one_call(nn.Module(), *inputs, None, trees=tuple(map(tuple, trees)))
    assert len(made) == 1
    assert all(one is other for each in seen for one, other in zip(each, seen[0], strict=True))
    assert not any(each.is_inference() for each in seen[0])
    attend_in_one_call(nn.Module(), *inputs, None, trees=((3, 6), (5,)))
    assert len(made) == 2


@pytest.mark.parametrize(("name", "more", "calls"), [
    ("Llama", {}, 2), ("Mistral", {"sliding_window": 5}, 2), ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 2.0}, 0),
    ("GptOss", {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2}, 0),
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_models_log_probs_and_gradients_are_those_of_one_sequence_at_a_time(
    kernel: Callable[[Kernel], None], name: str, more: dict[str, Any], calls: int, checkpointing: bool
) -> None:
    """Layers with soft caps or sinks attend one sequence at a time."""
    made = list[int]()

    def counted(*given: Any, **others: Any) -> Tensor:
        made.append(1)
        return stand_in(*given, **others)

    kernel(counted)
    attention.register()
    config = getattr(transformers, f"{name}Config")(
        **{**LLAMA.to_dict(), "model_type": None, "head_dim": 8, "pad_token_id": 0, **more}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS).train()
    model = model.double() if calls else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 90, n).astype(np.int32) for n in (7, 4)]
    rows = [
        (prompts[which], Completion(draw.integers(3, 90, n).astype(np.int32), np.ones(n, bool)))
        for which, n in ((0, 3), (1, 6), (0, 1), (0, 8))
    ]
    results = []
    for way in (SEGMENTS, VARLEN):
        model.set_attn_implementation(way)
        module = LanguageModel(model)
        assert module.plan.shares
        logps = module(pack(rows, share=True)).sum
        torch.tanh(logps / 50).sum().backward()
        results.append([logps.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
        model.zero_grad()
    assert len(made) == calls * (1 + checkpointing)
    assert len(results[0]) == len(results[1]) > 10
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


# --- which calls it takes ----------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "a CPU": {"device": "cpu"},
    "float32": {"dtype": torch.float32},
    "a soft cap": {"softcap": 30.0},
    "sinks": {"sinks": torch.zeros(4)},
    "dropout": {"dropout": 0.1},
    "heads of 264": {"size": 264},
    "heads of 60": {"size": 60},
    "heads of 208, which some cards lack": {"size": 208},
    "values of another size": {"value_size": 128},
    "keys of another dtype": {"key_dtype": torch.float16},
}


def is_taken(
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    key_dtype: torch.dtype | None = None,
    size: int = 64,
    value_size: int | None = None,
    **settings: Any,
) -> bool:
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 4, 10, size, dtype=dtype, device=device)
        key = torch.empty(1, 2, 10, size, dtype=key_dtype or dtype, device=device)
        value = torch.empty(1, 2, 10, value_size or size, dtype=dtype, device=device)
        return varlen.takes(query, key, value, **{"softcap": None, "sinks": None, "dropout": 0.0, **settings})


def test_half_precision_on_a_gpu_is_taken_and_nothing_that_the_kernel_lacks() -> None:
    assert is_taken()
    assert is_taken(dtype=torch.float16)
    assert is_taken(size=256)
    assert is_taken(size=8)
    assert {name for name, one in WRONG.items() if is_taken(**one)} == set()


def test_what_autocast_computes_in_half_precision_is_taken_and_cast(
    kernel: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings of float32 hidden states give float32 queries and keys beside half-precision values."""
    kernel(stand_in)
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16, torch.float16))
    assert not is_taken(device="cpu", key_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_taken(device="cpu", dtype=torch.float32)
        assert is_taken(device="cpu", key_dtype=torch.float32)
        assert not is_taken(device="cpu", dtype=torch.float64)
    trees = ((3, 2, 4),)
    query, key, value = varlen_trial.random_inputs(trees, 0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (
            of(nn.Module(), query, key, value.bfloat16(), None, trees=trees)[0] for of in (attend_in_one_call, attend_by_tree)
        )
    assert one.dtype == other.dtype == torch.bfloat16
    assert (one - other).abs().max() < 0.02


@pytest.mark.parametrize("more", [{"softcap": 2.0}, {"s_aux": torch.ones(4)}, {"dropout": 0.5}, {}])
def test_what_it_does_not_take_attends_one_sequence_at_a_time(
    kernel: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    def refused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the kernel was called")

    kernel(refused)
    if not more:
        monkeypatch.setattr(varlen, "DEVICES", ("cuda",))
    trees = ((3, 2, 4), (5,))
    inputs, outputs = varlen_trial.random_inputs(trees, 0, 8), []
    for of in (attend_in_one_call, attend_by_tree):
        torch.manual_seed(0)
        outputs.append(of(nn.Module(), *inputs, None, scaling=0.2, sliding_window=3, trees=trees, **more)[0])
    assert torch.equal(*outputs)
    with pytest.raises(UserError, match="without the lengths of packed sequences"):
        attend_in_one_call(nn.Module(), *inputs, None)


def test_scale_and_layout_are_those_of_one_sequence_at_a_time(kernel: Callable[[Kernel], None]) -> None:
    kernel(stand_in)
    trees = ((3, 2, 4), (5,))
    inputs = [each.double() for each in varlen_trial.random_inputs(trees, 0, 8)]
    one, other = (of(nn.Module(), *inputs, None, scaling=0.2, trees=trees)[0] for of in (attend_in_one_call, attend_by_tree))
    assert one.shape == other.shape == (1, 14, 4, 8)
    assert one.is_contiguous()
    assert torch.allclose(one, other, atol=1e-12)
    inputs[0] = torch.cat([inputs[0], inputs[0][:, :, :1]], 2)
    with pytest.raises(AssertionError, match="outside of all sequences"):
        attend_in_one_call(nn.Module(), *inputs, None, trees=trees)


def test_an_estimate_from_shapes_calls_torchs_kernel_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    calls, own = list[Any](), varlen.kernel()
    monkeypatch.setattr(varlen, "kernel", lambda: lambda *given, **more: calls.append(given) or own(*given, **more))
    attention.register()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(LLAMA)
    model.set_attn_implementation(VARLEN)
    assert activations.of(model.bfloat16(), CPU) is not None
    assert len(calls) == 3 * LLAMA.num_hidden_layers, "of a sequence, of two that share a prompt, and without gradients"
    assert varlen.layout_of.cache_info().currsize == 0


# --- the trial ---------------------------------------------------------------------------------------------------------


def test_a_right_kernel_passes_the_trial_which_is_made_once(kernel: Callable[[Kernel], None]) -> None:
    calls = list[int]()

    def counted(*given: Any, **more: Any) -> Tensor:
        calls.append(1)
        return stand_in(*given, **more)

    kernel(counted)
    with torch.no_grad(), torch.device("meta"):  # wherever a model is loaded
        assert varlen_trial.why_not(CPU) is None
    count = len(calls)
    assert count > 10
    assert varlen_trial.why_not(CPU) is None
    assert len(calls) == count


def leaking(query: Tensor, key: Tensor, value: Tensor, *given: Any, **more: Any) -> Tensor:
    """One number changes with all that the other sequences have, by less than rounding changes the whole."""
    output = stand_in(query, key, value, *given, **more)
    return torch.cat([output[:1] + value.detach().mean(), output[1:]])


def without_gradient(query: Tensor, key: Tensor, *given: Any, **more: Any) -> Tensor:
    return stand_in(query, key.detach() + 0 * key, *given, **more)


def with_window_off_by_one(*given: Any, window_size: tuple[int, int], **more: Any) -> Tensor:
    return stand_in(*given, window_size=(window_size[0] + (window_size[0] >= 0), 0), **more)


def with_usual_scale(query: Tensor, *given: Any, scale: float, **more: Any) -> Tensor:
    return stand_in(query, *given, scale=query.shape[-1] ** -0.5, **more)


def raising(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def unknown(*_: Any) -> Tensor:  # of an older torch, without further keywords
    raise AssertionError


KERNELS: list[tuple[Kernel, str]] = [
    (raising, r"does not run here: no kernel image is available$"),
    (unknown, r"does not run here: .*unexpected keyword argument"),
    (lambda *given, **more: stand_in(*given, **more, upper_left=True), r"is not exact: its output is \d off for heads of 64$"),
    (lambda *given, **more: stand_in(*given, **more) * float("nan"), r"is not exact: its output is inf off"),
    (with_window_off_by_one, r"is not exact: its output is 0\.\d+ off for heads of 128 and a window of 40$"),
    (with_usual_scale, r"is not exact: its output is 0\.\d+ off for heads of 128 and a window of 40$"),
    (without_gradient, r"is not exact: the gradient of its keys is \d off"),
    (leaking, r"lets branches read each other$"),
]


@pytest.mark.parametrize(("wrong", "why"), KERNELS, ids=[why for _, why in KERNELS])
def test_the_trial_refuses_a_kernel_that_is_wrong(
    kernel: Callable[[Kernel], None], wrong: Kernel, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernel(wrong)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        found = varlen_trial.why_not(CPU)
        assert found is not None
        assert re.search(why, found), found
    assert [record.getMessage() for record in caplog.records] == [
        f"packed sequences attend one at a time on this device, since torch's varlen kernel {found}"
    ]


def test_a_torch_without_the_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'torch.nn.attention.varlen'")

    monkeypatch.setattr(varlen, "kernel", missing)
    assert varlen_trial.why_not(CPU) == f"is not in torch {torch.__version__}"


def test_torchs_own_kernel_is_found_and_does_not_run_on_a_cpu() -> None:
    assert callable(varlen.kernel())
    assert "does not run here" in str(varlen_trial.why_not(CPU))


# --- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "half", "device", "installed", "trial", "expected"),
    [
        ("auto", True, GPU, False, None, VARLEN),
        ("auto", True, GPU, False, "is not exact", SEGMENTS),
        ("auto", True, GPU, True, None, "flash_attention_2"),
        ("auto", False, GPU, True, None, SEGMENTS),
        ("auto", True, CPU, True, None, SEGMENTS),
        ("segments", True, GPU, True, None, SEGMENTS),
        ("varlen", True, GPU, True, None, VARLEN),
        ("flash_attention_2", True, GPU, True, "is not exact", "flash_attention_2"),
        (
            "varlen",
            True,
            GPU,
            False,
            "is not exact: 1 off",
            "torch's varlen kernel is not exact: 1 off; use model.attention=segments",
        ),
        ("varlen", False, GPU, False, None, "needs a GPU and bfloat16 (train.precision); or use model.attention=segments"),
        ("varlen", True, CPU, False, None, "needs a GPU and bfloat16 (train.precision); or use model.attention=segments"),
        ("flash_attention_2", True, GPU, False, None, "needs the package flash-attn: pip install flash-attn"),
    ],
)
def test_the_attention_is_what_runs_and_is_right(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    half: bool,
    device: torch.device,
    installed: bool,
    trial: str | None,
    expected: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: (True if installed else None) if module == "flash_attn" else find(module)
    )
    tried = list[torch.device]()
    monkeypatch.setattr(varlen_trial, "why_not", lambda on: tried.append(on) or trial)
    if " " in expected:
        with pytest.raises(UserError, match=f"model.attention={name}.*{re.escape(expected)}"):
            chosen(name, half=half, device=device)
    else:
        assert chosen(name, half=half, device=device) == expected
    assert set(tried) <= ({GPU} if half else set()), "nothing is tried where it is not needed"
    assert bool(tried) == (half and device == GPU and (name == "varlen" or (name == "auto" and not installed)))


def test_its_plan_shares_prompts_as_that_of_segments_does() -> None:
    made = plan.plan_for(LLAMA, reward=None, attention=VARLEN)
    assert (made.attention, made.is_packed, made.shares) == (VARLEN, True, True)
    assert {SEGMENTS, VARLEN} == {*attention.TREES} < {*PACKS}
    assert attention.PREFIX + "varlen" == VARLEN
