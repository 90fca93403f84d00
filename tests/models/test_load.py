"""New tokens start at the mean, trained tokens keep their embeddings, and a model that cannot be loaded is one message."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from halos.config.defaults import section
from halos.config.schema import Config, Scorer
from halos.data.tokenize import end_of_turn
from halos.errors import UserError
from halos.logps.vocabulary import Vocabulary
from halos.models import tiny
from halos.models.load import keep_marks_special, load_model, load_tokenizer
from halos.reward_kind import RewardKind
from halos.rollout.scorers.reward_model import RewardModel
from halos.run.lifecycle import run

CSFT = ["loss=csft", "train.batch_size=8", "optim.lr=1e-3", "train.eval_every=null"]


def test_new_tokens_start_at_the_mean_of_the_others(tmp_path: Path) -> None:
    tiny.build(tmp_path / "tiny")
    tokenizer, new = load_tokenizer(tmp_path / "tiny", add_tokens=["<|good|>", "<|bad|>"])
    assert new == ["<|good|>", "<|bad|>"]
    ids = Vocabulary.of(tokenizer, new).new
    model = load_model(tmp_path / "tiny", tokenizer, reward=None, dtype=torch.float32, attention="sdpa", new_tokens=ids)
    table = model.get_input_embeddings().weight
    known = len(AutoTokenizer.from_pretrained(tmp_path / "tiny"))
    assert table.shape[0] >= len(tokenizer)
    for token in new:
        assert torch.allclose(table[tokenizer.get_vocab()[token]], table[:known].mean(0), atol=1e-6)


def test_rewards_and_judges_see_tokens_that_were_added(tmp_path: Path) -> None:
    tiny.build(tmp_path / "tiny")
    tokenizer, new = load_tokenizer(tmp_path / "tiny", add_tokens=["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = each.encode("<|user|>2<think>so</think>3<|end|>", add_special_tokens=False)
        assert {*each.convert_tokens_to_ids(new)} <= {*ids}, "each is one token"
        assert each.decode(ids, skip_special_tokens=True) == "2<think>so</think>3"


def test_marks_of_turns_that_were_added_stay_special_and_end_the_turns(tmp_path: Path) -> None:
    tiny.build(tmp_path / "tiny")
    new = ["<|im_start|>", "<|im_end|>", "<think>"]
    tokenizer, _ = load_tokenizer(tmp_path / "tiny", add_tokens=new)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    keep_marks_special(tokenizer, new)
    ids = tokenizer.encode("<|im_start|>user\n<think>so<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n<think>so"
    assert end_of_turn(tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    tiny.build(tmp_path / "tiny")
    tokenizer, _ = load_tokenizer(tmp_path / "tiny", add_tokens=[])
    common: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa"}
    for kind in RewardKind:
        load_model(tmp_path / "tiny", tokenizer, reward=kind, **common).save_pretrained(tmp_path / kind.value)
        load_model(tmp_path / kind.value, tokenizer, reward=kind, **common)
        for empty in (True, False):
            with pytest.raises(
                UserError, match=rf"{kind.value} is a reward model \(Llama{kind.architecture}\): a policy, reference"
            ):
                load_model(tmp_path / kind.value, tokenizer, reward=None, empty=empty, **common)


def without(directory: Path, name: str, settings: dict[str, Any]) -> None:
    """Write a small base without one tensor to `directory`."""
    tiny.build(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    weights = {key: value for key, value in load_file(directory / "model.safetensors").items() if key != name}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "settings", "reward", "lost"),
    [
        (UP, {}, None, UP),
        (UP, {}, RewardKind.OUTCOME, UP),
        ("", {"tie_word_embeddings": False}, None, "lm_head.weight"),
        ("", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, RewardKind.OUTCOME, "score.weight"),
        ("", {}, RewardKind.OUTCOME, None),
        ("", {}, None, None),
    ],
)
def test_missing_weights_are_not_initialised_at_random(
    name: str, settings: dict[str, Any], reward: RewardKind | None, lost: str | None, tmp_path: Path
) -> None:
    without(tmp_path / "base", name, settings)
    tokenizer, _ = load_tokenizer(tmp_path / "base", add_tokens=[])
    with nullcontext() if lost is None else pytest.raises(UserError, match=f"lacks 1 tensors of a .*, such as {lost}"):
        load_model(tmp_path / "base", tokenizer, reward=reward, dtype=torch.float32, attention="sdpa")
    if lost == "score.weight":
        with pytest.raises(UserError, match=f"lacks 1 tensors of a .*, such as {lost}"):
            RewardModel(tmp_path / "base", section(Scorer, batch_size=1), max_length=None, quiet=True)._load()


SPOILT = {
    "tokenizer.json": (b'{"model": {"type": "Evil"}}', "its tokenizer could not be loaded: "),
    "config.json": (b"[1]", "its config.json could not be loaded: "),
    "model.safetensors": (b"\xff" * 64, "could not be loaded as a AutoModelForCausalLM: "),
}


def test_every_error_of_a_library_on_a_broken_file_is_one_message(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.build(base)
    tokenizer, _ = load_tokenizer(base, add_tokens=[])

    def load() -> object:
        if name == "tokenizer.json":
            return load_tokenizer(base, add_tokens=[])
        return load_model(base, tokenizer, reward=None, dtype=torch.float32, attention="sdpa")

    for name, (content, words) in SPOILT.items():
        whole = (base / name).read_bytes()
        (base / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(base))}.*{words}.") as refused:
            load()
        assert "\n" not in str(refused.value)
        (base / name).write_bytes(whole)


def test_trained_control_tokens_survive_a_resume_and_a_second_stage(configure: Callable[..., Config], tmp_path: Path) -> None:
    assert run(configure(*CSFT, "train.steps=4", "checkpoint.every=2", "exp_name=whole"), []) == 0
    assert run(configure(*CSFT, "train.steps=4", "checkpoint.every=2", "exp_name=cut"), []) == 0
    for name in ("FINAL", "checkpoints/step-00000004"):
        (tmp_path / "cut" / name).rename(tmp_path / ("away-" + name[-5:]))
    (tmp_path / "cut" / "result.json").unlink()
    assert train.start([f"resume={tmp_path / 'cut'}"]) == 0
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "FINAL").state_dict() for name in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())
    _, new = load_tokenizer(tmp_path / "whole" / "FINAL", add_tokens=["<|good|>"])
    assert new == []


def test_a_model_empty_has_the_generation_settings_of_a_loaded_one(tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    tiny.build(base)
    own = {"eos_token_id": [1, 200], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(own))
    tokenizer, _ = load_tokenizer(base, add_tokens=[])
    made = [
        load_model(base, tokenizer, reward=None, dtype=torch.float32, attention="sdpa", empty=empty).generation_config
        for empty in (False, True)
    ]
    assert made[0].to_diff_dict() == made[1].to_diff_dict()
    assert (made[1].temperature, made[1].eos_token_id) == (0.6, [1, 200])


def test_the_labels_of_a_process_reward_model_are_not_read_the_wrong_way_round(tmp_path: Path) -> None:
    """Those of another kind's head are not those of the new one."""
    tiny.build(base := tmp_path / "base")
    tokenizer, path = load_tokenizer(base, add_tokens=[])[0], base / "config.json"
    config = json.loads(path.read_text())

    def loaded(architecture: str, *names: str) -> dict[int, str]:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        path.write_text(json.dumps({**config, **labels, "architectures": [architecture]}))
        settings: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "empty": True}
        return load_model(base, tokenizer, reward=RewardKind.PROCESS, **settings).config.id2label

    assert loaded("LlamaForSequenceClassification", "toxic", "polite") == {0: "bad", 1: "good"}
    assert loaded("LlamaForTokenClassification", "Wrong", "Right") == {0: "Wrong", 1: "Right"}
    for names in (("good", "bad"), ("Correct", "other"), ("0", "WRONG")):
        with pytest.raises(UserError, match="its scores would be read the wrong way round"):
            loaded("LlamaForTokenClassification", *names)
