"""A sharded checkpoint: loaded unsharded or sharded, exported, and refused if it is another model's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from halos.checkpoint import __main__ as cli
from halos.checkpoint import manifest, sharded, weights
from halos.config.schema import Config
from halos.distributed.replicated import Replicated
from halos.errors import UserError
from halos.export.consolidate import consolidated
from halos.logps.model import ActorCritic
from halos.models import tiny
from halos.run.lifecycle import run
from tests import mixtures

SIZES = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).float()


def parts_of(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return what each of two ranks of ZeRO-3 would write: every other tensor."""
    return [{name: value for n, (name, value) in enumerate(tensors.items()) if n % 2 == rank} for rank in (0, 1)]


def write(directory: Path, module: nn.Module, inner: nn.Module) -> None:
    """Write as two ranks would, one after the other, both as rank 0: torch names the files of a rank by its number."""
    whole = Replicated(Accelerator(cpu=True)).shards(module)
    for rank, part in enumerate(parts_of(whole)):
        weights.save_shards(directory / str(rank), inner, part, None, main=rank == 0)
    target = directory / weights.SHARDED
    shutil.move(directory / "0" / weights.SHARDED, target)
    for path in (directory / "1" / weights.SHARDED).iterdir():
        shutil.move(path, target / path.name.replace("shard-00001", "shard-00002"))


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_written_in_parts_is_read_into_a_model_without_weights(tied: bool, tmp_path: Path) -> None:
    one, other = ActorCritic(model(tied=tied)), ActorCritic(model(tied=tied, seed=1))
    nn.init.normal_(one.value_head.weight)
    write(tmp_path, one, one.model)
    weights.load_shards(tmp_path / weights.SHARDED, Replicated(Accelerator(cpu=True)), other)
    for (name, mine), (_, theirs) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
    assert (other.model.lm_head.weight is other.model.model.embed_tokens.weight) is tied


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    one = ActorCritic(model())
    write(tmp_path, one, one.model)
    wider = ActorCritic(LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 32})))
    with pytest.raises(UserError, match=r"model-sharded is not the model of this run: it holds no model\..*mlp.* of this shape"):
        weights.load_shards(tmp_path / weights.SHARDED, Replicated(Accelerator(cpu=True)), wider)


def run_with_parts(configure: Callable[..., Config], tmp_path: Path, base: Path, *overrides: str) -> tuple[Path, Path]:
    """Return a checkpoint, and a copy of it with a sharded model."""
    assert run(configure(*overrides, f"model.name_or_path={base}", "train.steps=2", "checkpoint.every=1"), []) == 0
    saved = tmp_path / "run" / "checkpoints" / "step-00000001"
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "model")
    inner = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    module: Any = nn.ModuleDict({"model": inner})
    if (copy / weights.VALUE_HEAD).is_dir():
        module["value_head"] = nn.Linear(inner.config.hidden_size, 1)
        weights.load_value_head(saved, module["value_head"])
        shutil.rmtree(copy / weights.VALUE_HEAD)
    write(copy, module, inner)
    for rank in "01":
        shutil.rmtree(copy / rank)
    (copy / manifest.NAME).write_text(manifest.describe(copy, {"step": 1, "world_size": 2}))
    return saved, copy


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_an_export_of_parts_is_the_export_of_the_whole(
    family: str, configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's experts are one tensor in memory, and one each in its files; PPO has a value head."""
    base = tmp_path / "base"
    if family == "Llama":
        tiny.build(base)
    else:
        mixtures.build(family, base)
    loss = ["loss=ppo", f"data.train=['{scored(tmp_path)}']", "data.eval=[]"] if family == "Llama" else []
    saved, copy = run_with_parts(configure, tmp_path, base, *(loss or ["loss=sft"]), "train.batch_size=2")
    outputs = {}
    for place in (saved, copy):
        outputs[place] = tmp_path / f"{place.name}-out"
        monkeypatch.setattr("sys.argv", ["halos.checkpoint", "export", str(place), "--output", str(outputs[place])])
        assert cli.main() == 0
    one, other = outputs[saved], outputs[copy]
    for file in ("model.safetensors", *([f"{weights.VALUE_HEAD}/{weights.HEAD_FILE}"] if loss else [])):
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    assert not list(tmp_path.glob(".consolidate-*"))


def scored(place: Path) -> Path:
    rows = [{"type": "scalar_feedback", "prompt": f"{n} + 1 =", "output": f" {n + 1}", "reward": n % 2} for n in range(8)]
    path = place / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parts_cannot_be_a_model_that_a_run_begins_with(configure: Callable[..., Config], tmp_path: Path) -> None:
    parts = tmp_path / "save" / weights.SHARDED
    one = ActorCritic(model())
    write(parts.parent, one, one.model)
    with pytest.raises(UserError, match=r"python -m halos\.checkpoint export .*save --output DIRECTORY"):
        configure("loss=sft", f"model.name_or_path={parts}")
    parts.rename(parts.with_name("model"))
    with pytest.raises(UserError, match="a sharded model, of which each rank wrote its part"):
        configure("loss=sft", f"model.name_or_path={parts.with_name('model')}")


def test_a_tensor_that_is_not_there_is_not_drawn_at_random(tmp_path: Path) -> None:
    one = ActorCritic(model())
    write(tmp_path, one, one.model)
    for path in (tmp_path / weights.SHARDED).glob("shard-00002*"):
        path.unlink()
    assert sharded.shapes(tmp_path / weights.SHARDED)
    with pytest.raises(UserError, match="it holds no model"):
        weights.load_shards(tmp_path / weights.SHARDED, Replicated(Accelerator(cpu=True)), ActorCritic(model()))


def in_rows(directory: Path, *parts: tuple[int, int]) -> None:
    """Write files with rows of a table of 8, as a rank of FSDP2 writes its own."""
    table = torch.arange(24.0).reshape(8, 3)
    directory.mkdir(exist_ok=True)
    for number, (first, last) in enumerate(parts, 1):
        rows = table[first:last]
        facts = {"DCP_SHARDING_INFO": json.dumps({"table": {"saved_offsets": [first, 0]}}), "DCP_VERSION": "1.0"}
        save_file({"table": rows.clone()}, directory / f"shard-{number:05d}-model-00001-of-00001.safetensors", facts)


def test_rows_of_several_files_are_one_table(tmp_path: Path) -> None:
    in_rows(tmp_path, (0, 3), (3, 8))
    table = torch.zeros(8, 3)
    sharded.read(tmp_path, {"table": table})
    assert torch.equal(table, torch.arange(24.0).reshape(8, 3))


@pytest.mark.parametrize("parts", [[(3, 8)], [(0, 3), (5, 8)], [(0, 5), (3, 8)]])
def test_rows_that_no_file_has_or_two_have_are_refused(parts: list[tuple[int, int]], tmp_path: Path) -> None:
    in_rows(tmp_path, *parts)
    for act in (sharded.shapes, lambda place: sharded.read(place, {"table": torch.zeros(8, 3)})):
        with pytest.raises(UserError, match="is not whole: of table its files hold"):
            act(tmp_path)


def test_an_export_of_fewer_rows_than_the_model_has_is_refused(tmp_path: Path) -> None:
    """The last file is missing: the others look like a smaller table."""
    one = ActorCritic(model())
    write(tmp_path, one, one.model)
    directory = tmp_path / weights.SHARDED
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    said = r"is not whole, or of another shape than its config\.json says: (lm_head|model\.embed_tokens)\.weight"
    with pytest.raises(UserError, match=said), consolidated(directory, tmp_path, reward=None):
        pass
