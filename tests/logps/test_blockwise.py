"""Attention by blocks of queries in bfloat16, held against a dense softmax in float64."""

import importlib.util
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from halos.logps import attention, blockwise

HEADS, KV_HEADS, SIZE = 6, 2, 16
SIZES = [(1, 1), (1, 9), (7, 7), (63, 64), (64, 64), (65, 65), (128, 200), (130, 130), (30, 210)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(queries + 1000 * keys)
    shapes = (HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys), (HEADS, queries)
    query, key, value, gradient = (torch.randn(1, *shape, SIZE, generator=random).bfloat16() for shape in shapes)
    return (2 * query).requires_grad_(), (2 * key).requires_grad_(), value.requires_grad_(), gradient


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """By its definition, from one matrix of all logits."""
    earlier = key.shape[2] - query.shape[2]
    places, seen = torch.arange(query.shape[2])[:, None] + earlier, torch.arange(key.shape[2])
    hidden = (seen > places) | (seen <= places - (window or math.inf))
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    logits = (query @ key.mT * scale).masked_fill(hidden, -math.inf)
    return logits.softmax(-1) @ value


def results(attend: object, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    output = attend(query, key, value)  # type: ignore[operator]
    return [output, *torch.autograd.grad(output, (query, key, value), gradient.to(output.dtype))]


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(queries: int, keys: int, window: int | None) -> None:
    inputs, gradient = (all_of := drawn(queries, keys))[:3], all_of[3]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    truth = results(lambda *of: dense(*of, 0.3, window), *exact, gradient)
    found = results(lambda *of: blockwise.attend(*of, scale=0.3, window=window), *inputs, gradient)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype is torch.bfloat16
        assert (ours - theirs).norm() <= 2**-7 * theirs.norm() + 1e-6


def test_a_call_without_storage_leaves_nothing_to_later_ones() -> None:
    """As the estimate of a dry run makes before the run itself, in one process."""
    spec = importlib.util.spec_from_file_location("fresh_blockwise", blockwise.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fresh.attend(*drawn(100, 100)[:3], scale=0.3, window=None).shape == (1, HEADS, 100, SIZE)
    query, key, value = (each.detach() for each in drawn(100, 100)[:3])
    before = fresh.attend(query, key, value, scale=0.3, window=None)
    key[:, :, 50:] += 1
    assert torch.equal(fresh.attend(query, key, value, scale=0.3, window=None)[:, :, :50], before[:, :, :50])


def test_it_is_no_less_exact_than_torchs_own() -> None:
    """Of each result the distance from float64, of all sizes together. torch rounds weights before their sum divides them, where
    the largest is 1, so that its output is a little closer; its gradients are further off by half."""
    totals = torch.zeros(2, 4)
    for queries, keys in SIZES[3:]:
        *inputs, gradient = drawn(queries, keys)
        exact = [each.detach().double().requires_grad_() for each in inputs]
        truth = results(lambda *of: dense(*of, 0.25, None), *exact, gradient)
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

        def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = mask) -> Tensor:
            key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
            return scaled_dot_product_attention(query, key, value, mask, scale=0.25)

        for number, attend in enumerate((lambda *of: blockwise.attend(*of, scale=0.25, window=None), torchs)):
            found = results(attend, *inputs, gradient)
            totals[number] += torch.tensor([((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)])
    assert totals[0, 0] < 1.4 * totals[1, 0], totals
    assert (totals[0, 1:] < 0.9 * totals[1, 1:]).all(), totals


def test_later_tokens_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = drawn(130, 130)
    before = blockwise.attend(query, key, value, scale=0.25, window=None)
    with torch.no_grad():
        for each in (query, key, value):
            each[:, :, 100:] = 9.0
    after = blockwise.attend(query, key, value, scale=0.25, window=None)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_only_plain_attention_in_bfloat16_is_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    attend = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *of, **more: calls.append(of[0].shape[2]) or attend(*of, **more))
    query, key, value, _ = drawn(20, 20)

    def called(kind: torch.dtype = torch.bfloat16, **settings: object) -> list[int]:
        calls.clear()
        of = (each.to(kind) for each in (query, key, value))
        attention.attend_by_tree(torch.nn.Identity(), *of, None, trees=((6, 4, 5), (3, 2)), **settings)  # type: ignore[arg-type]
        return [*calls]

    assert called() == [10, 5, 5]
    assert called(dropout=0.1) == called(softcap=5.0) == called(torch.float32) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert called() == called(torch.float32) == [10, 5, 5]
    with torch.autocast("cpu", torch.float16):
        assert called(torch.float32) == []
