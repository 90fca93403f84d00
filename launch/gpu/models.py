"""Models of random weights and rows of known lengths, made on the spot."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gpu.place import Place, Result
from halos.models import tiny

KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "tie_word_embeddings")  # fmt: skip
SHAPES: dict[str, tuple[Any, ...]] = {
    "exact": (4096, 256, 704, 4, 4, 2, 64, True),
    "small": (49152, 576, 1536, 12, 9, 3, 64, True),
    "wide": (151936, 1536, 8960, 2, 12, 2, 128, True),  # the real vocabulary and width, two layers
    "1.5b": (151936, 1536, 8960, 28, 12, 2, 128, True),
    "8b": (128256, 4096, 14336, 32, 32, 8, 128, False),
}
TOY: dict[str, tuple[Any, ...]] = {
    "exact": (1024, 64, 176, 2, 4, 2, 16, True),
    "small": (1024, 64, 176, 2, 4, 2, 16, True),
    "wide": (4096, 96, 256, 2, 4, 2, 24, True),
    "1.5b": (2048, 96, 256, 4, 4, 2, 24, True),
    "8b": (2048, 96, 256, 4, 4, 2, 24, False),
}
SHARD = 2 * 2**30  # bytes of a file of weights


def check(name: str, place: Place) -> Result:
    """Build the model `model-NAME`, where later checks find it."""
    began, short = time.monotonic(), name.removeprefix("model-")
    size = build(short, place)
    seconds = time.monotonic() - began
    return Result("passed", f"{size / 1e6:.4g} M parameters written in {seconds:.1f} s", {"parameters": size})


def build(name: str, place: Place, directory: Path | None = None) -> int:
    """Write a Llama of random bfloat16 weights with the tokenizer of model=tiny; return its number of parameters."""
    directory = directory or place.model(name)
    tiny.build(directory)
    (directory / "model.safetensors").unlink()
    shape = dict(zip(KEYS, (SHAPES if place.cuda else TOY)[name], strict=True))
    config = LlamaConfig.from_pretrained(directory, **shape, max_position_embeddings=4096, dtype="bfloat16")
    config.save_pretrained(directory)
    files: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        writes, total = list[Future[None]](), 0
        for number, shard in enumerate(_shards(config, place.device)):
            file = f"model-{number:05}.safetensors"
            writes.append(pool.submit(save_file, shard, directory / file, metadata={"format": "pt"}))
            files |= dict.fromkeys(shard, file)
            total += sum(weight.numel() for weight in shard.values())
        for write in writes:
            write.result()
    index = {"metadata": {"total_size": 2 * total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(config: LlamaConfig, device: str) -> Iterator[dict[str, Tensor]]:
    """The weights, drawn on the device: ones for norms, else normal numbers."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator, shard, size = torch.Generator(device).manual_seed(0), dict[str, Tensor](), 0
    for name, parameter in model.named_parameters():  # tied ones once
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            weight = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
        if shard and size + weight.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name], size = weight, size + weight.nbytes
    yield shard
