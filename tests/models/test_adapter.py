"""Adapters on bases in half precision."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from halos.models import adapter
from tests.models.test_targets import SETTINGS


def test_norms_whose_bias_alone_is_trained_compute_as_the_base_does() -> None:
    """peft.bias=all trains a norm's bias, in float32, and not its weight; torch refuses the two types together."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    base = GPT2LMHeadModel(config).bfloat16().eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = base.transformer(ids).last_hidden_state
    adapted = adapter.attach(base, {**SETTINGS, "bias": "all"}, base="base", reward=None, seed=0).eval()
    norms = [module for module in adapted.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert all(norm.bias.requires_grad and norm.bias.dtype is torch.float32 and not norm.weight.requires_grad for norm in norms)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = adapted.get_base_model().transformer(ids).last_hidden_state
    assert hidden.dtype is expected.dtype
    assert torch.equal(hidden, expected)
