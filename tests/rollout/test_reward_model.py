"""Scores of a reward model: those that plain transformers gives, one at a time."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from halos.config.defaults import section
from halos.config.schema import Scorer
from halos.data import arithmetic
from halos.errors import UserError
from halos.hashes import json_hash
from halos.models.load import load_tokenizer
from halos.models.locate import locate
from halos.rollout.scorers.reward_model import RewardModel
from halos.rollout.types import Prompt, Sample


@pytest.fixture
def place(cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A classifier on tiny's backbone with as many labels as the test asks for."""
    source, labels = locate("tiny", None, cache), request.param
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    model.score.weight.data.normal_()
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "rm")
    load_tokenizer(source, add_tokens=[])[0].save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def samples() -> list[Sample]:
    rows = [row for _, row in zip(range(9), arithmetic.rows("eval"), strict=False)]
    texts = [row["chosen"][0]["content"] + " so" * n for n, row in enumerate(rows)]
    return [Sample(Prompt(str(n), tuple(row["prompt"])), 0, text) for n, (row, text) in enumerate(zip(rows, texts, strict=True))]


def model_of(place: Path, *, label: int | None, max_length: int | None = None) -> RewardModel:
    return RewardModel(place, section(Scorer, label=label, batch_size=4), max_length=max_length, quiet=True)


@torch.no_grad()
def one_at_a_time(place: Path, samples: list[Sample], label: int) -> list[float]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(place), load_tokenizer(place, add_tokens=[])[0]
    found = []
    for sample in samples:
        turns = [*sample.prompt.turns, *sample.messages]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        found.append(model(input_ids=ids).logits[0, label].item())
    return found


@pytest.mark.parametrize(("place", "label"), [(1, None), (2, 1)], indirect=["place"], ids=["one label", "HALOs' two"])
def test_batches_give_what_each_alone_would(place: Path, label: int | None) -> None:
    rows = samples()
    scorer = model_of(place, label=label)
    found = {each.prompt.id: score.value for each, score in scorer.score(rows)}
    assert [found[row.prompt.id] for row in rows] == pytest.approx(one_at_a_time(place, rows, label or 0), abs=1e-4)


@pytest.mark.parametrize("place", [2], indirect=True)
def test_which_of_several_labels_counts_must_be_said(place: Path) -> None:
    with pytest.raises(UserError, match="has 2 labels: say which one"):
        model_of(place, label=None)
    with pytest.raises(UserError, match="has 2 labels, counted from 0"):
        model_of(place, label=2)


@pytest.mark.parametrize("place", [1], indirect=True)
def test_a_sample_that_is_too_long_has_no_score(place: Path) -> None:
    rows = samples()
    scorer = model_of(place, label=None, max_length=40)
    found = {each.prompt.id: score for each, score in scorer.score(rows)}
    assert len(found) == len(rows)
    long = [score for score in found.values() if score.value is None]
    assert 0 < len(long) < len(rows)
    assert {score.problem for score in long} == {"longer than max_length"}


@pytest.mark.parametrize("place", [1], indirect=True)
def test_scores_are_of_the_tokenizer_and_the_config_too(place: Path) -> None:
    before = model_of(place, label=None).request()
    for name, change in {"tokenizer_config.json": {"eos_token": "<|user|>"}, "config.json": {"rms_norm_eps": 1e-2}}.items():
        text = (place / name).read_text()
        (place / name).write_text(json.dumps({**json.loads(text), **change}))
        now = model_of(place, label=None).request()
        assert {key for key in before if now[key] != before[key]} == {name.replace("_config.json", "")}
        (place / name).write_text(text)
    assert model_of(place, label=None).request() == before


@pytest.mark.parametrize("place", [1], indirect=True)
def test_a_template_that_writes_the_date_scores_by_that_of_the_run(place: Path) -> None:
    def of(day: date | None) -> RewardModel:
        return RewardModel(place, section(Scorer, label=None, batch_size=4), max_length=None, quiet=True, day=day)

    plain = of(None).request()
    assert of(date(2031, 5, 7)).request() == plain, "of a template that writes none"
    tokenizer = load_tokenizer(place, add_tokens=[])[0]
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(place)
    first, again, other = (of(date(2031, 5, day)) for day in (7, 7, 28))
    found = [[score.value for _, score in model.score(samples())] for model in (first, again, other)]
    assert found[0] == found[1] != found[2]
    assert (first.date, other.date, of(None).date) == ("2031-05-07", "2031-05-28", None)
    assert first.request() == again.request() == other.request() | {"date": "2031-05-07"} != other.request()
    settings = section(Scorer, name="reward_model", model=str(place), label=None)
    assert RewardModel.content(settings, cache=place)["model.chat_template"] == json_hash(tokenizer.chat_template)


def test_a_language_model_is_no_reward_model(cache: Path) -> None:
    with pytest.raises(UserError, match="is no reward model: its architecture is LlamaForCausalLM"):
        model_of(locate("tiny", None, cache), label=None)
