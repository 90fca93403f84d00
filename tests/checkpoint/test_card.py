"""The model card says what was done, and nothing of what was not."""

from typing import Any

from halos.checkpoint import card

CONFIG: dict[str, Any] = {
    "loss": {"_target_": "halos.losses.dpo.dpo", "beta": 0.1}, "schedule": {"name": "cosine", "warmup": 0.1, "final": 0.0},
    "train": {"steps": 200, "epochs": 1, "batch_size": 64, "max_length": 256, "precision": "auto"}, "seed": 0,
    "optim": {"name": "adamw", "lr": 1e-6, "weight_decay": 0.0}, "peft": {"name": "none", "r": 16, "lora_alpha": 32.0},
}  # fmt: skip


def test_full_fine_tuning_has_no_rank_and_steps_stand_alone() -> None:
    text = card._settings(CONFIG)
    assert "| peft.name | none |" in text
    assert "peft.r" not in text
    assert "| train.steps | 200 |" in text
    assert "epochs" not in text


def test_lora_has_its_rank_and_a_run_by_epochs_their_number() -> None:
    text = card._settings({**CONFIG, "peft": {**CONFIG["peft"], "name": "lora"}, "train": {**CONFIG["train"], "steps": None}})
    assert "| peft.r | 16 |" in text
    assert "| train.epochs | 1 |" in text


def test_the_code_that_loads_a_model_says_what_its_path_is() -> None:
    text = card._how_to_load([], adapter=False, reward=None, vocabulary=None)
    assert 'path = "path/to/this/directory"  # where this file lies' in text
    assert text.count("from_pretrained(path)") == 2


def test_an_evaluation_has_the_step_that_it_is_of_once_also_beside_a_later_checkpoint() -> None:
    def lines(step: int, before: int | None, after: int) -> list[str]:
        evaluations = {at: {"step": at, "loss": 0.5 - at / 100} for at in (0, 4)}
        result = {"step": step, "before": evaluations.get(before), "metrics": evaluations[after]}
        return card._metrics({"result": result}).splitlines()[2:]

    table = ["| | step 0 |", "| --- | --- |", "| loss | 0.5 |"]
    assert lines(2, 0, 0) == ["These weights are of step 2; the last evaluation before them is of step 0.", "", *table]
    assert lines(4, 0, 4) == ["| | step 0 | step 4 |", "| --- | --- | --- |", "| loss | 0.5 | 0.46 |"]
    assert lines(4, None, 4) == ["| | before | step 4 |", "| --- | --- | --- |", "| loss |  | 0.46 |"]
