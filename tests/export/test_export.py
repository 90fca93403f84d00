"""python -m halos.checkpoint export: what any save becomes, with its card and lineage, and what is refused."""

import json
import re
import resource
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import compose
from safetensors.torch import load_file, save_file

import train
from halos.checkpoint import __main__ as cli
from halos.checkpoint import lineage, manifest
from halos.config.schema import Config
from halos.errors import UserError
from halos.export import export, hub
from halos.merge import expected
from halos.models import tiny
from halos.models.load import read_config
from halos.models.locate import locate
from halos.run.lifecycle import run
from tests import mixtures

VARYING = ("manifest.json", "README.md", "merge_report.json")  # the title and the time of an export
SHORT = ["train.steps=4", "train.batch_size=8", "checkpoint.every=2", "optim.lr=1e-2", "train.eval_at_start=true"]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`ends("export", ...)`: the exit status of a command and what it said."""

    def typed(*overrides: Any) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["halos.checkpoint", *map(str, overrides)])
        status = cli.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return typed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with LoRA, a whole one that goes on from its FINAL, and a reward model."""
    place = tmp_path_factory.mktemp("runs")

    def make(name: str, *overrides: str) -> None:
        assert run(compose(cache, place, f"exp_name={name}", *SHORT, *overrides), []) == 0

    make("lora", "loss=sft", "peft=lora")
    make("whole", "loss=dpo", "model=path", f"model.name_or_path={place / 'lora' / 'FINAL'}", "train.max_length=256")
    make("reward", "loss=reward", "peft=lora")
    return place


@pytest.fixture
def step(runs: Path) -> Path:
    return runs / "lora" / "checkpoints" / "step-00000002"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(7, 27)[None]).logits


# --- what it becomes


@pytest.mark.parametrize("overrides", [[], ["--merged"]])
def test_a_step_of_a_lora_run_becomes_a_merged_model(overrides: list[str], step: Path, tmp_path: Path, ends: Any) -> None:
    out = tmp_path / "out"
    transformers.utils.logging.enable_progress_bar()  # as in a process of its own, before any run has hushed it
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        status, said = ends("export", step, "--output", out, *overrides)
    assert (status, [str(each.message) for each in heard if each.category is FutureWarning]) == (0, [])
    assert said.startswith(f"{out}: ")
    assert said.count("\n") == 1, "no bars of what is loaded"
    assert manifest.verify(out) == []
    assert json.loads((out / "merge_report.json").read_text())["holds"]
    settings = peft.PeftConfig.from_pretrained(str(step / "adapter"))
    base = transformers.AutoModelForCausalLM.from_pretrained(settings.base_model_name_or_path)
    truth = logits(peft.PeftModel.from_pretrained(base, str(step / "adapter")))
    assert torch.allclose(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), truth, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "generation_config.json").is_file()


def test_final_is_handed_over_as_it_was_proved(runs: Path, tmp_path: Path, ends: Any) -> None:
    assert ends("export", runs / "lora", "--output", tmp_path / "out")[0] == 0
    names = ("model.safetensors", "merge_report.json", "tokenizer.json")
    for mine, final in ((tmp_path / "out" / name, runs / "lora" / "FINAL" / name) for name in names):
        assert mine.read_bytes()[-1000:] == final.read_bytes()[-1000:], mine.name
    mine, final = (load_file(place / "model.safetensors") for place in (tmp_path / "out", runs / "lora" / "FINAL"))
    assert all(tensor.equal(mine[name]) for name, tensor in final.items())


@pytest.mark.parametrize("overrides", [["--merged"], ["--adapter"]])
def test_a_disk_that_is_full_is_said_and_leaves_nothing(overrides: list[str], step: Path, tmp_path: Path, ends: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        status, said = ends("export", step, "--output", tmp_path / "out", *overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert re.search("out: no space is left there. Nothing was exported", said)


def test_an_adapter_alone_loads_with_peft(step: Path, tmp_path: Path, ends: Any) -> None:
    out = tmp_path / "out"
    assert ends("export", step, "--output", out, "--adapter")[0] == 0
    assert not (out / "config.json").exists()
    settings = peft.PeftConfig.from_pretrained(str(out))
    base = transformers.AutoModelForCausalLM.from_pretrained(settings.base_model_name_or_path)
    before = logits(base)
    assert (logits(peft.PeftModel.from_pretrained(base, str(out))) - before).abs().max() > 1e-3
    assert front(out)["library_name"] == "peft"
    assert lineage.read(out)["runs"][-1]["result"]["adapter"] == lineage.identity(step / "adapter")  # type: ignore[index]


@pytest.mark.parametrize("overrides", [["--merged"], ["--adapter"]])
@pytest.mark.parametrize("place", ["checkpoints/step-00000002", "FINAL"])
def test_the_adapters_own_directory_is_exported_with_all_that_goes_with_it(
    place: str, overrides: list[str], runs: Path, tmp_path: Path, ends: Any
) -> None:
    whole, own = tmp_path / "whole", tmp_path / "own"
    base = str(peft.PeftConfig.from_pretrained(str(runs / "lora" / place / "adapter")).base_model_name_or_path)
    for path, output in ((runs / "lora" / place, whole), (runs / "lora" / place / "adapter", own)):
        assert ends("export", path, "--output", output, "--base", base, *overrides)[0] == 0
    both = [{path.name: path.read_bytes() for path in at.iterdir() if path.name not in VARYING} for at in (whole, own)]
    assert both[0] == both[1]
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja", "lineage.json"} <= both[0].keys()
    assert json.loads(both[1]["generation_config.json"])["eos_token_id"] == [1], "a list: the run's, and not the base's"


def test_what_goes_with_an_adapter_is_not_exported_damaged(runs: Path, tmp_path: Path, ends: Any) -> None:
    final = Path(shutil.copytree(runs / "lora" / "FINAL", tmp_path / "FINAL"))
    (final / "chat_template.jinja").write_text("{{ 'other' }}")
    status, said = ends("export", final / "adapter", "--adapter", "--output", tmp_path / "out")
    assert (status, "chat_template.jinja: " in said) == (2, True), said


@pytest.mark.parametrize("place", ["checkpoints/step-00000002", "FINAL"])
def test_a_whole_model_is_rounded_and_cut_as_asked(place: str, runs: Path, tmp_path: Path, ends: Any) -> None:
    saved, out = runs / "whole" / place, tmp_path / "out"
    assert ends("export", saved, "--output", out, "--dtype", "bfloat16", "--max-shard-size", "200KB")[0] == 0
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 210_000 or len(load_file(path)) == 1 for path in files)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype is torch.bfloat16
    original = transformers.AutoModelForCausalLM.from_pretrained(saved / "model" if "step" in place else saved)
    assert all(torch.equal(model.state_dict()[name], tensor.bfloat16()) for name, tensor in original.state_dict().items())


def test_a_reward_model_keeps_its_score(runs: Path, tmp_path: Path, ends: Any) -> None:
    saved = runs / "reward" / "checkpoints" / "step-00000002"
    assert ends("export", saved, "--output", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    assert front(tmp_path / "out")["pipeline_tag"] == "text-classification"


def test_a_step_of_a_reward_model_is_exported_with_the_labels_dropout_and_padding_token_of_final(
    cache: Path, tmp_path: Path, ends: Any
) -> None:
    base = shutil.copytree(locate("tiny", None, cache), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    given = ("loss=prm", "peft=lora", "model=path", f"model.name_or_path={base}", "train.max_length=256", "exp_name=steps")
    assert run(compose(cache, tmp_path, *SHORT, *given), []) == 0
    assert ends("merge", tmp_path / "steps" / "checkpoints" / "step-00000002", "--output", tmp_path / "out")[0] == 0
    final, exported = (json.loads((at / "config.json").read_text()) for at in (tmp_path / "steps" / "FINAL", tmp_path / "out"))
    assert exported == final
    assert (final["id2label"], final["pad_token_id"], final["classifier_dropout"]) == ({"0": "bad", "1": "good"}, 0, 0.0)


def test_a_copy_that_is_not_the_original_is_not_left_behind(
    runs: Path, tmp_path: Path, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected, "expected_copy", lambda *_: {})
    status, said = ends("export", runs / "whole", "--output", tmp_path / "out")
    assert status == 2
    assert "the exported weights differ from the saved ones" in said
    assert list(tmp_path.iterdir()) == []


# --- card and lineage


def front(directory: Path) -> dict[str, Any]:
    _, text, _ = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_card_of_final_says_what_the_model_is(runs: Path) -> None:
    final = runs / "lora" / "FINAL"
    assert {key: front(final)[key] for key in ("library_name", "pipeline_tag", "tags")} == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["halos", "sft"]}  # fmt: skip
    text = (final / "README.md").read_text()
    after = json.loads((final / "metrics.json").read_text())["eval"]
    before = next(json.loads(line) for line in (runs / "lora" / "metrics.jsonl").read_text().splitlines())
    assert f"| loss | {before['loss']:.4g} | {after['loss']:.4g} |" in text
    assert after["loss"] < before["loss"]
    for part in (
        "`tiny`, trained with LoRA by `loss=sft` on `arithmetic`",
        "| peft.r | 16 |",
        "| optim.lr | 0.01 |",
        "from_pretrained",
    ):
        assert part in text, part


def test_names_of_the_hub_stand_in_the_cards_front_matter_and_paths_do_not(runs: Path, tmp_path: Path) -> None:
    from halos.checkpoint import card

    chain = lineage.read(runs / "whole" / "FINAL")
    assert chain is not None
    card.write(tmp_path, chain, adapter=False, reward=None, title="x")
    assert "base_model" not in front(tmp_path)
    chain["runs"][0]["base"]["name"] = "org/base"
    chain["runs"][0]["data"]["train"] = [{"path": "org/rows", "hash": "0"}, {"path": "/home/me/rows.jsonl", "hash": "1"}]
    card.write(tmp_path, chain, adapter=False, reward=None, title="x")
    assert front(tmp_path)["base_model"] == "org/base"
    assert front(tmp_path)["datasets"] == ["org/rows"]
    assert "/home/me" not in (tmp_path / "README.md").read_text().split("---\n", 2)[1]


def test_the_lineage_goes_on_through_a_second_stage(runs: Path, cache: Path) -> None:
    chain = lineage.read(runs / "whole" / "FINAL")
    assert chain is not None
    first, second = chain["runs"]
    assert (first["loss"], second["loss"]) == ("sft", "dpo")
    base = locate("tiny", None, cache)
    assert first["base"]["sha256"] == lineage.identity(base)
    assert second["base"]["sha256"] == lineage.identity(runs / "lora" / "FINAL") == first["result"]["model"]
    assert "changed" not in second["base"]
    assert first["result"]["adapter"] == lineage.identity(runs / "lora" / "FINAL" / "adapter")
    assert second["result"]["model"] == lineage.identity(runs / "whole" / "FINAL")
    assert second["result"]["step"] == 4
    assert first["config"]["peft"]["r"] == 16
    assert len(first["data"]["train"][0]["hash"]) >= 16
    at_step = lineage.read(runs / "whole" / "checkpoints" / "step-00000002")
    assert at_step is not None
    assert at_step["runs"][1]["result"]["model"] == lineage.identity(runs / "whole" / "checkpoints" / "step-00000002" / "model")


def test_weights_that_were_changed_after_their_run_are_told_in_the_lineage(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lora" / "FINAL", tmp_path / "final")
    config = {"model": {"name_or_path": "x", "revision": None}}
    assert "changed" not in lineage.begin(tmp_path / "final", config)["runs"][-1]["base"]
    path = tmp_path / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    assert "changed" in lineage.begin(tmp_path / "final", config)["runs"][-1]["base"]


def test_no_secret_enters_the_lineage(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "tk_0123456789abcdefghij")
    config = {"model": {"name_or_path": "x", "revision": "tk_0123456789abcdefghij"}}
    assert "tk_0123" not in json.dumps(lineage.begin(runs / "lora" / "FINAL", config))


def test_an_export_in_another_dtype_is_the_end_of_its_own_lineage(runs: Path, tmp_path: Path, ends: Any) -> None:
    assert ends("export", runs / "whole", "--output", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    chain = lineage.read(tmp_path / "out")
    assert chain is not None
    assert chain["runs"][-1]["result"]["model"] == lineage.identity(tmp_path / "out")


# --- bases that are gone or others


@pytest.fixture
def moved(step: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose base is not where it was, and where that is now."""
    settings = peft.PeftConfig.from_pretrained(str(step / "adapter"))
    shutil.copytree(str(settings.base_model_name_or_path), tmp_path / "base")
    shutil.copytree(step, tmp_path / "step")
    path = tmp_path / "step" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone/away"}))
    (tmp_path / "step" / manifest.NAME).write_text(manifest.describe(tmp_path / "step", {}))
    return tmp_path / "step", tmp_path / "base"


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_base_that_is_gone_is_one_message_and_may_be_named(
    command: str, moved: tuple[Path, Path], step: Path, tmp_path: Path, ends: Any
) -> None:
    saved, base = moved
    status, said = ends(command, saved, "--output", tmp_path / "out")
    assert (status, said.count("error:"), said.count("\n")) == (2, 1, 1)
    assert "trained on /gone/away, which is not here" in said
    assert "--base" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "step"]
    assert ends(command, saved, "--output", tmp_path / "out", "--base", base)[0] == 0
    assert ends(command, step, "--output", tmp_path / "usual")[0] == 0
    mine, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "usual"))
    assert all(tensor.equal(mine[name]) for name, tensor in usual.items())


def alter(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")


@pytest.mark.parametrize("overrides", [[], ["--adapter"]])
def test_a_base_of_other_weights_is_refused(overrides: list[str], moved: tuple[Path, Path], tmp_path: Path, ends: Any) -> None:
    saved, base = moved
    alter(base)
    status, said = ends("export", saved, "--output", tmp_path / "out", "--base", base, *overrides)
    assert (status, said.count("\n")) == (2, 1)
    assert "it is another model or was changed since" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "step"]


@pytest.mark.parametrize("overrides", [[], ["--adapter"]])
def test_a_base_of_another_config_is_refused(overrides: list[str], moved: tuple[Path, Path], tmp_path: Path, ends: Any) -> None:
    saved, base = moved
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    status, said = ends("export", saved, "--output", tmp_path / "out", "--base", base, *overrides)
    assert (status, said.count("\n")) == (2, 1)
    assert "rms_norm_eps 1e-06 -> 0.5" in said


def test_an_adapter_does_not_go_on_from_another_base(configure: Callable[..., Config], tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "lora" / "FINAL", tmp_path / "base", ignore=shutil.ignore_patterns("manifest.json"))
    overrides = ["loss=sft", "peft=lora", "model=path", f"model.name_or_path={tmp_path / 'base'}", *SHORT]
    assert run(configure(*overrides), []) == 0
    shutil.rmtree(tmp_path / "run" / "FINAL")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    alter(tmp_path / "base")
    with pytest.raises(UserError, match=rf"model.weights {tmp_path / 'base'} \(content\)"):
        train.start([f"resume={tmp_path / 'run'}"])


# --- what is refused

WRONG = [
    (["{whole}", "--adapter"], "holds no adapter"),
    (["{whole}", "--merged"], "holds no adapter"),
    (["{lora}", "--max-shard-size", "5"], "'5' is no size"),
    (["{lora}", "--max-shard-size", "0GB"], "is no size"),
    (["{lora}", "--adapter", "--dtype", "float32"], "for whole weights"),
    (["{lora}", "--private"], "--push-to-hub"),
    (["{lora}", "--push-to-hub", "no good/name"], "--push-to-hub no good/name"),
    (["{lora}", "--push-to-hub", "name"], "write ORG/NAME"),
    (["{nowhere}"], "no such directory"),
    (["{data}"], "neither an adapter nor a model"),
]


@pytest.mark.parametrize(("overrides", "part"), WRONG, ids=lambda part: " ".join(part) if isinstance(part, list) else None)
def test_a_wrong_export_is_one_message(overrides: list[str], part: str, runs: Path, tmp_path: Path, ends: Any) -> None:
    places = {"whole": runs / "whole", "lora": runs / "lora", "nowhere": tmp_path / "no", "data": runs / "lora" / "attempts"}
    first, *rest = overrides
    status, said = ends("export", first.format(**places), "--output", tmp_path / "out", *[word for word in rest if word])
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("error: ")
    assert part in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overrides", [[], ["--adapter"]])
def test_an_export_to_where_nothing_can_be_written_is_one_message(
    overrides: list[str], runs: Path, tmp_path: Path, ends: Any
) -> None:
    (tmp_path / "file").write_text("")
    status, said = ends("export", runs / "lora", "--output", tmp_path / "file" / "out", *overrides)
    assert (status, said.count("\n")) == (2, 1)
    assert f"{tmp_path / 'file' / 'out'} cannot be written: " in said
    assert said.endswith("; name another --output\n")


def test_a_run_that_goes_on_after_its_final_is_asked_which_model_is_meant(runs: Path, tmp_path: Path, ends: Any) -> None:
    going_on = shutil.copytree(runs / "lora", tmp_path / "run")
    final, step = going_on / "FINAL", going_on / "checkpoints" / "step-00000004"
    (final / manifest.NAME).write_text(manifest.describe(final, {"step": 2}))
    status, said = ends("export", going_on, "--output", tmp_path / "out")
    assert (status, (tmp_path / "out").exists()) == (2, False)
    assert f"has gone on since its FINAL, which is of step 2: name {final}, or {step}" in said
    assert ends("export", final, "--output", tmp_path / "of_final")[0] == 0
    assert ends("export", step, "--output", tmp_path / "of_step")[0] == 0


def test_a_checkpoint_that_is_not_whole_is_not_exported(step: Path, tmp_path: Path, ends: Any) -> None:
    shutil.copytree(step, tmp_path / "step")
    (tmp_path / "step" / "metrics.json").write_text("{}")
    status, said = ends("export", tmp_path / "step", "--output", tmp_path / "out")
    assert status == 2
    assert "metrics.json" in said
    assert not (tmp_path / "out").exists()


# --- the hub


class Stub:
    """HfApi's part that is used, writing down what it is asked."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repo_id: str, **given: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **given}))
        if self.error:
            raise self.error

    def create_branch(self, repo_id: str, **given: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **given}))

    def upload_folder(self, **given: Any) -> str:
        self.calls.append(
            ("upload_folder", {**given, "files": sorted(path.name for path in Path(given["folder_path"]).iterdir())})
        )
        return "https://huggingface.co/org/name/commit/1"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setattr(hub, "HfApi", Stub)
    monkeypatch.setattr(Stub, "calls", [])
    return Stub


def test_an_export_is_pushed_whole(
    runs: Path, tmp_path: Path, ends: Any, stub: type[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    overrides = ["--push-to-hub", "org/name", "--private", "--revision", "step-4"]
    status, said = ends("export", runs / "lora", "--output", tmp_path / "out", *overrides)
    assert status == 0
    assert "https://huggingface.co/org/name/commit/1" in said
    assert [name for name, _ in stub.calls] == ["create_repo", "create_branch", "upload_folder"]
    calls = SimpleNamespace(**dict(stub.calls))
    assert calls.create_repo == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert calls.create_branch == {"repo_id": "org/name", "branch": "step-4", "exist_ok": True}
    assert calls.upload_folder["revision"] == "step-4"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "lineage.json"} <= set(
        calls.upload_folder["files"]
    )
    assert not any(name.startswith(".") for name in calls.upload_folder["files"])
    assert "hf_0123" not in said


def test_a_push_that_fails_is_one_message_without_the_token(
    runs: Path, tmp_path: Path, ends: Any, stub: type[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    monkeypatch.setattr(stub, "error", OSError("no way to the hub with hf_0123456789abcdefghij\nmore"))
    status, said = ends("export", runs / "lora", "--output", tmp_path / "out", "--push-to-hub", "org/name")
    assert status == 2
    assert "error:" in said
    assert "is written, but org/name could not be pushed to" in said
    assert "hf_0123" not in said
    assert manifest.verify(tmp_path / "out") == []


@pytest.mark.parametrize("whole", ["embed_tokens", "embed_tokens,lm_head"])
def test_the_code_on_an_adapters_card_gives_the_model_that_was_trained(
    whole: str, configure: Callable[..., Config], tmp_path: Path, ends: Any
) -> None:
    place = tmp_path / "base"
    make_untied(place)
    added = ["model.add_tokens=['<|yes|>', '<|no|>', '<|maybe|>']", "checkpoint.every=null", "train.max_length=128"]
    base = ["model=path", f"model.name_or_path={place}", f"peft.modules_to_save=[{whole}]"]
    assert run(configure("loss=sft", "peft=lora", *SHORT, *base, *added, "exp_name=grown"), []) == 0
    out = tmp_path / "out"
    assert ends("export", tmp_path / "grown" / "FINAL", "--output", out, "--adapter")[0] == 0
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    assert "resize_token_embeddings" in code
    scope: dict[str, Any] = {}
    exec(code.replace('"path/to/this/directory"', repr(str(out))), scope)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown" / "FINAL").eval()
    ids = scope["tokenizer"]("<|yes|><|no|>Ada has 3 coins<|maybe|>", return_tensors="pt").input_ids
    with torch.no_grad():
        mine, theirs = scope["model"].eval()(input_ids=ids).logits, merged(input_ids=ids).logits
    assert mine.shape == theirs.shape
    assert torch.allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize(("end", "after"), [("<|end|>", ""), ("<|end|>", "\n"), ("", "\n")])
def test_the_code_on_a_reward_models_card_gives_the_score_that_it_was_trained_to_give(
    end: str, after: str, configure: Callable[..., Config], tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        f"{{% for m in messages %}}{{{{ '<|' + m['role'] + '|>' + m['content'] + '{end}' }}}}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {after!r} }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"}) + "\n")
    words = ["train.steps=2", "checkpoint.every=null", f"data.train=[{data}]", "data.eval=[]", f"model.chat_template={template}"]
    assert run(configure("loss=reward", *words, "exp_name=judge"), []) == 0
    final = tmp_path / "judge" / "FINAL"
    (code,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text(), re.S)
    scope: dict[str, Any] = {}
    exec(code.replace('"path/to/this/directory"', repr(str(final))), scope)
    tokens = scope["tokenizer"].encode(f"<|user|>What is 2 + 3?{end}<|assistant|>5<|end|>", add_special_tokens=False)
    with torch.no_grad():
        trained = scope["model"](input_ids=torch.tensor([tokens])).logits[0, 0].item()
    assert scope["score"] == trained


def make_untied(place: Path) -> None:
    """The small model with a head of its own, so that each of the two tables shows what became of it."""
    tiny.build(place)
    tensors = load_file(place / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 0.1
    save_file({**tensors, "lm_head.weight": head}, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def test_of_two_exports_into_one_directory_the_second_is_refused_and_the_first_is_whole(
    ends: Callable[..., tuple[int, str]], step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    overrides, seen = ["export", step, "--output", tmp_path / "out"], []
    plain = export._copy_tokenizer_and_head

    def beside(saved: Any, place: Path) -> None:
        monkeypatch.setattr(export, "_copy_tokenizer_and_head", plain)
        seen.append(ends(*overrides))  # while the first is at work
        plain(saved, place)

    monkeypatch.setattr(export, "_copy_tokenizer_and_head", beside)
    assert ends(*overrides)[0] == 0
    [(status, said)] = seen
    assert (status, "is being written by another process" in said, "Traceback" in said) == (2, True, False)
    assert not manifest.verify(tmp_path / "out")


def test_an_exported_model_has_what_stays_float32_and_every_chat_template(tmp_path: Path, ends: Any) -> None:
    base = mixtures.build("DeepseekV3", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(base)
    assert ends("export", base, "--output", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    wanted = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    mine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in mine.items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.keys() == {"default", "tool_use"}
    assert manifest.verify(tmp_path / "out") == []


def test_a_model_with_an_adapter_beside_it_is_neither_exported_nor_trained(tmp_path: Path, ends: Any) -> None:
    tiny.build(tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    status, said = ends("export", tmp_path / "base", "--output", tmp_path / "out")
    assert status == 2
    assert "a whole model and an adapter side by side" in said
    with pytest.raises(UserError, match="side by side"):
        read_config(tmp_path / "base")
