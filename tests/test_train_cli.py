"""The command line: arguments become a run, or one message and exit status 2."""

import os
import re
import shlex
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import train
from halos.cli import command, overrides, resume
from halos.config import resume_policy, run_config
from halos.config.schema import Config
from halos.config.values import as_argument
from halos.distributed.signals import STOP_SIGNALS
from halos.errors import UserError
from halos.rundir import RunDir

ROOT = Path(__file__).parents[1]
RUN = ("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=demo")


class Build(ModuleType):
    """Stands in for halos.run: remembers what it was to run."""

    def __init__(self):
        super().__init__("halos.run")
        self.calls, self.changed, self.status = [], {}, 0

    def run(self, config, typed, changed=()):
        assert isinstance(config, Config)
        self.calls.append((config, typed))
        self.changed = {change.key: [change.old, change.new] for change in changed}
        if isinstance(self.status, BaseException):
            raise self.status
        return self.status


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_TOKEN", "tk_0123456789abcdefghij")
    monkeypatch.setenv("MY_PASSWORD", "sh0rt-one")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    stub = Build()
    monkeypatch.setitem(sys.modules, "halos.run", stub)
    return stub


def launch(monkeypatch, **told):
    """The environment of a rank."""
    whole = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **told}
    for name, value in whole.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cli(monkeypatch, capsys):
    monkeypatch.setattr(command, "exit_process", sys.exit)  # one of several processes would end these tests' own

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as caught:
            train.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.fixture
def refused(cli, build):
    """The one message of a command that is refused before anything is built."""

    def call(*words):
        status, out, err = cli(*words)
        assert status == 2, err
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, "one message, no traceback"
        assert build.calls == []
        return err

    return call


# --- what runs


def test_a_whole_command_reaches_the_run(cli, build):
    status, _, err = cli(
        *RUN, "loss.beta=0.5", "train.steps=3", "+hooks.tb._target_=halos.hooks.trackers.TensorBoard", "optim.lr=5e-7"
    )
    assert (status, err) == (0, "")
    [(config, typed)] = build.calls
    assert config.loss == {"_target_": "halos.losses.dpo.dpo", "beta": 0.5}
    assert config.loss_choice == "dpo"
    assert (config.train.steps, config.optim["lr"], config.run_dir) == (3, 5e-7, "runs/demo")
    assert config.hooks == {"tb": {"_target_": "halos.hooks.trackers.TensorBoard"}}
    assert "loss.beta=0.5" in typed


def test_keys_below_a_free_mapping_need_no_plus_sign(cli, build):
    words = [
        "peft=lora",
        "peft.rank_pattern.q_proj=4",
        "peft.alpha_pattern={v_proj: 2}",
        "++train.steps=7",
        "train={batch_size: 8}",
    ]
    assert cli(*RUN, *words)[0] == 0
    config = build.calls[0][0]
    assert (config.peft.rank_pattern, config.peft.alpha_pattern) == ({"q_proj": 4}, {"v_proj": 2})
    assert (config.train.steps, config.train.batch_size) == (7, 8)


@pytest.mark.parametrize("words", [["resume=[x]"], ["resume=true"], ["resume="], ["resume=a", "resume=b"]])
def test_resume_takes_one_directory(refused, words):
    assert f"{' '.join(words)}: resume= takes one run directory" in refused(*words)


def test_a_rank_exits_with_the_status_without_interpreter_shutdown():
    said = """if True:
        import atexit, os
        from halos.distributed.children import exit_process
        os.environ['WORLD_SIZE'] = '2'
        atexit.register(print, 'flushed')
        exit_process(75)
    """
    ended = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (75, "flushed\n")


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_exit_status_is_that_of_the_run(cli, build, status):
    build.status = status
    assert cli(*RUN)[0] == status


def test_wrong_input_found_by_the_run_is_one_message_too(cli, build):
    build.status = UserError("a.jsonl, line 3: no assistant turn; saw tk_0123456789abcdefghij")
    status, _, err = cli(*RUN)
    assert status == 2
    assert err == "error: a.jsonl, line 3: no assistant turn; saw <MY_TOKEN>\n"


def test_an_interrupt_is_no_crash(cli, build):
    build.status = KeyboardInterrupt()
    status, _, err = cli(*RUN)
    assert (status, err) == (130, "")


def test_a_crash_of_ours_keeps_its_traceback(monkeypatch, build):
    build.status = RuntimeError("a defect")
    monkeypatch.setattr(sys, "argv", ["train.py", *RUN])
    with pytest.raises(RuntimeError, match="a defect"):
        train.main()


# --- what does not: (typed after RUN, words of the message)

WRONG = [
    (["loss=dpoo"], ["loss has no choice 'dpoo'", "kto", "did you mean loss=dpo?"]),
    (["loss=dop"], ["did you mean loss=dpo?"]),  # letters swapped, though dpop has more of them in order
    (["peft=qlora"], ["QLoRA is peft=lora model.quantize=4bit"]),
    (["loss=null"], ["loss has no choice null", "dpo"]),
    (["loss=[dpo,kto]"], ["loss has no choice"]),
    (["logging=null"], ["did you mean logging=none?"]),
    (["experiment=mine"], ["experiment has no choice 'mine'", "config/experiment"]),
    (["model=org/name"], ["model.name_or_path=org/name"]),
    (["data=a.jsonl"], ["data.train=[a.jsonl]"]),
    (["model=lora"], ["did you mean peft=lora?"]),
    (["los=dpo"], ["'los'", "did you mean loss?"]),
    (["+loss=dpo"], ["write loss=dpo"]),
    (["++loss=dpo"], ["write loss=dpo"]),
    (["~loss"], ["loss cannot be removed"]),
    (["train.stepz=3"], ["train.stepz", "did you mean train.steps?"]),
    (["+train.stepz=3"], ["train.stepz", "did you mean train.steps?"]),
    (["++train.stepz=3"], ["train.stepz", "did you mean train.steps?"]),
    (["~train.stepz"], ["train.stepz", "did you mean train.steps?"]),
    (["train={stepz: 3}"], ["train.stepz", "did you mean train.steps?"]),
    (["loss={betta: 3}"], ["loss.betta", "did you mean loss.beta?"]),
    (["lr=1e-4"], ["did you mean optim.lr?"]),
    (["beta=1"], ["did you mean loss.beta?"]),
    (["train.steps.x=1"], ["train.steps takes a whole number"]),
    (["+train.steps=3"], ["train.steps exists already", "write train.steps=3"]),
    (["+loss.beta=3"], ["loss.beta exists already", "write loss.beta=3"]),
    (["~train.steps"], ["cannot be removed"]),
    (["~hooks.none"], ["hooks.none"]),
    (["loss.betta=0.2"], ["dpo takes no 'betta'; it takes beta (did you mean beta?)"]),
    (["++loss.betta=0.2"], ["dpo takes no 'betta'"]),
    (["loss.beta=much"], ["loss.beta takes a number (above 0), not 'much'"]),
    (["train.steps=many"], ["train.steps takes a whole number"]),
    (["seed=${nope}"], ["seed is ${nope}"]),
    (["data.train=a.jsonl"], ["data.train=[a.jsonl]"]),
    (["data.train={path: a.jsonl}"], ["data.train takes a list, not {path: 'a.jsonl'}: write 'data.train=[...]'"]),
    (["data.columns=[prompt]"], ["data.columns takes a mapping, not ['prompt']: write 'data.columns={NAME: VALUE}'"]),
    (["data.train=a.jsonl,b.jsonl"], ["data.train=[a.jsonl,b.jsonl]"]),
    (["data.train=[a.jsonl,", "b.jsonl]"], ["'data.train=[a.jsonl, ...'"]),
    (["data.train[0]=a.jsonl"], ["data.train.0.path="]),
    (['peft.rank_pattern={"layers.0.q_proj": 2}'], ["have no quotes: 'peft.rank_pattern={layers.0.q_proj: 2}'"]),
    (["exp_name=a,b"], ["-m", "'exp_name=\"a,b\"'"]),
    (["loss=dpo,kto"], ["one choice", "-m"]),
    (["exp_name=a=b"], ["'exp_name=\"a=b\"'"]),
    (["model.chat_template={{x}}"], ["'model.chat_template=\"{{x}}\"'"]),
    (["model.name_or_path=~/x"], ["'model.name_or_path=\"~/x\"'"]),
    (["exp_name='unclosed"], ["'exp_name=\"unclosed\"'"]),
    (["train.steps"], ["'train.steps' is not key=value"]),
    (["--lr", "3"], ["no option --lr", "lr="]),
    (["--steps=3"], ["no option --steps", "steps=3"]),
    (["exp_name=a/b"], ["exp_name", "a/b"]),
    (["peft.r=8"], ["peft.r", "peft=lora"]),
    (["hydra/launcher=nope"], ["hydra/launcher"]),
    (["hydra.nope=3"], ["hydra.nope"]),
    (["--config-dir", "nowhere"], ["--config-dir", "nowhere"]),
    (["resume=runs/nope"], ["resume=runs/nope"]),
    (["hooks.x.api_key=abc"], ["hooks.x.api_key", "WANDB_API_KEY"]),
    (["hooks.x.api_key=abc=def"], ["hooks.x.api_key", "WANDB_API_KEY"]),
    (["model.revision=tk_0123456789abcdefghij"], ["model.revision"]),
    (["resume=x", "-m"], ["-m"]),
    (["train.steps=5", "train.epochs=1", "resume=auto"], ["train.steps=5 and train.epochs=1 are two lengths of one run"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG, ids=lambda part: " ".join(part)[:50])
def test_wrong_input_is_one_message_that_names_the_key_and_the_remedy(refused, words, parts):
    err = refused(*RUN, *words)
    for part in parts:
        assert part in err
    assert "tk_0123" not in err
    assert "abc=def" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["loss is missing", "dpo", "kto", "sft"]),
        (["loss=dpo"], ["model.name_or_path is missing", "smollm2", "tiny"]),
        (["loss=dpo", "model=tiny"], ["data.train is missing", "arithmetic"]),
        (["loss=dpo", "model=tiny", "data.train=[org/a]"], ["data.eval is missing", "data.eval=[]"]),
        (["loss=dpo", "model=tiny", "data=gsm8k"], ["exp_name is missing"]),
        (["loss=dpo", "model=tiny", "data=gsm8k", "exp_name=x"], ["data.root=DIRECTORY"]),
        (["objective.metric=loss"], ["loss is missing"]),
    ],
)
def test_a_missing_choice_lists_the_choices(refused, words, parts):
    err = refused(*words)
    for part in parts:
        assert part in err


# --- processes


def test_only_rank_0_speaks_and_the_others_wait(cli, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    launch(monkeypatch, RANK="1", LOCAL_RANK="1")
    assert cli("loss=dpoo") == (2, "", "")
    assert waited == [2]


def test_a_batch_smaller_than_the_number_of_processes_is_refused(refused, monkeypatch):
    launch(monkeypatch, WORLD_SIZE="4")
    assert "train.batch_size=4" in refused(*RUN, "train.batch_size=3")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4"}, "but not RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four, which is no number"),
        ({"WORLD_SIZE": "-1", "RANK": "\x1b[31m0"}, "which is no number"),
    ],
)
def test_leftover_rank_variables_are_refused_before_anything_waits_for_them(refused, monkeypatch, left, said):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    told = refused(*RUN)
    assert said in told
    assert "\x1b" not in told


NAMES = ["demo", "x(1),y", "it's", "a b", r"q\"'", r"back\\", "ü", "[a]", "{a: b}", "$(touch pwned)", "a=b", "~x"]


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_resume_command_works_in_the_shell_and_our_parser(name):
    [word] = shlex.split(as_argument("resume", Path("runs") / name))
    assert resume.requested_run([overrides.parse(word, {})]) == f"runs/{name}"


def test_a_start_within_a_process_leaves_signals_and_arguments_as_they_were(build, monkeypatch):
    def run(*_):
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return 75

    monkeypatch.setattr(build, "run", run, raising=False)
    words, handlers = sys.argv, [signal.getsignal(number) for number in STOP_SIGNALS]
    assert train.start(RUN) == 75
    with pytest.raises(UserError, match="loss has no choice"):
        train.start(["loss=dpoo"])
    with pytest.raises(UserError, match="exp_name is missing"):
        train.start(RUN[:-1])
    assert sys.argv is words
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_a_run_records_the_choice_of_its_loss(cli, build, refused):
    Path("mine/experiment").mkdir(parents=True)
    head = "# @package _global_\ndefaults:\n  - override /loss: dapo\n  - _self_\n"
    Path("mine/experiment/given.yaml").write_text(head + "train:\n  steps: 3\n", encoding="utf-8")
    Path("mine/experiment/changed.yaml").write_text(
        head.replace("dapo", "dpo") + "loss:\n  _target_: halos.losses.hinge.hinge\n", encoding="utf-8"
    )
    live = ["online.steps=2", "online.scorer.functions=[exact_match]"]
    for words, choice in [
        (["--config-dir", "mine", "experiment=given"], "dapo"),
        (["loss=dpo", "loss._target_=halos.losses.hinge.hinge"], None),
        (["--config-dir", "mine", "experiment=changed"], None),
        (["loss=online", "online.loss=max_rl", *live], "max_rl"),
    ]:
        assert cli(*words, *RUN[1:])[0] == 0
        assert build.calls.pop()[0].loss_choice == choice, words
    assert "there is no key 'loss_choice': a run records it" in refused(*RUN, "loss_choice=ipo")


# --- sweeps


def test_a_sweep_runs_each_job_in_a_directory_named_by_its_overrides(cli, build):
    status, _, err = cli("-m", *RUN, "loss.beta=0.1,0.2", "peft=lora", "peft.rank_pattern.q=1")
    assert (status, err) == (0, "")
    places = [Path(config.run_dir) for config, _ in build.calls]
    assert [config.loss["beta"] for config, _ in build.calls] == [0.1, 0.2]
    assert {place.parent for place in places} == {Path("runs/demo")}
    assert len(set(places)) == 2
    assert places[0].name.startswith("loss.beta-0.1-")


def test_a_sweep_may_go_over_all_choices_that_match(cli, build):
    assert cli("-m", *RUN[1:], "loss=glob([ip*,kt*])")[0] == 0
    assert [config.loss["_target_"] for config, _ in build.calls] == ["halos.losses.ipo.ipo", "halos.losses.kto.kto"]
    assert [config.loss_choice for config, _ in build.calls] == ["ipo", "kto"]


def test_flags_and_keys_may_come_in_any_order(cli, build):
    assert cli(RUN[0], "-m", *RUN[1:], "loss.beta=0.1,0.2")[0] == 0
    assert len(build.calls) == 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["loss=dpo,ktoo"], "did you mean loss=kto?"),
        (["train.stepz=1,2"], "did you mean train.steps?"),
        (["loss.beta=-1,2"], "loss.beta takes a number"),
        (["exp_name=null"], "exp_name is missing"),
        (["model.revision=main,sh0rt-one"], "model.revision"),
        (["exp_name=run"], "share its name"),
    ],
)
def test_a_sweep_is_checked_before_it_begins(refused, words, part):
    run = RunDir("runs/run")
    run.create(overwrite=False)
    run.write_config("seed: 0")
    assert part in refused("-m", *RUN, *words)
    assert os.listdir("runs") == ["run"]
    assert not (run.path / "multirun.yaml").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["loss.beta=0.1,0.2,-1"], ["loss.beta takes a number", "in the job loss.beta=-1"]),
        (["peft=lora,none", "peft.r=4,8"], ["peft.r has no effect with peft=none", "in the job peft=none peft.r=4"]),
        (["loss=dpo,sft", "loss.beta=0.1"], ["no key 'loss.beta'", "in the job loss=sft"]),
        (["loss=glob(*)", "reference.name_or_path=org/x"], ["uses no reference model"]),
    ],
)
def test_every_job_of_a_sweep_is_checked_before_the_first_one_starts(refused, words, parts):
    err = refused("-m", *RUN, *words)
    for part in parts:
        assert part in err
    assert not Path("runs").exists()


def test_for_a_searching_sweeper_every_value_is_checked_once():
    typed = [overrides.parse(text, {}) for text in ("loss=dpo,kto", "seed=3", "a=1,2,3", "b=interval(0,1)", "c=x,y")]
    jobs = overrides.one_by_one(typed)
    assert jobs[0] == ["loss=dpo", "seed=3", "a=1", "c=x"]
    assert len(jobs) == 5
    assert len(overrides.all_combinations(typed)) == 12
    assert {word for job in jobs for word in job} == {"loss=dpo", "loss=kto", "seed=3", "a=1", "a=2", "a=3", "c=x", "c=y"}


def test_a_sweep_ends_at_the_first_job_that_does_not_finish(cli, build):
    build.status = 75
    assert cli("-m", *RUN, "loss.beta=0.1,0.2")[0] == 75
    assert len(build.calls) == 1


def test_a_sweep_inside_a_launcher_is_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "hydra/launcher=accelerate" in refused("-m", *RUN, "loss.beta=0.1,0.2")


# --- going on


@cache
def _begun():
    """The config.yaml of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *RUN, "train.steps=10", "plugins=[yaml]"])
        with pytest.raises(SystemExit):
            train.main()
    return run_config.dump(sys.modules["halos.run"].calls.pop()[0])


@pytest.fixture
def demo(build):
    """A run that was begun, and moved elsewhere since."""
    run = RunDir("moved/demo")
    run.create(overwrite=False)
    run.write_config(re.sub(r"^cache_dir: .*", f"cache_dir: {os.environ['HALOS_CACHE']}", _begun(), flags=re.MULTILINE))
    run.write_result("stopped", 5, {})
    (run.checkpoints / "step-00000005").mkdir(parents=True)
    return run


def test_a_moved_run_resumes_with_its_own_config(cli, build, demo):
    status, _, err = cli("resume=moved/demo")
    assert (status, err) == (0, "")
    config, typed = build.calls[0]
    assert (config.resume, config.run_dir, config.train.steps) == ("moved/demo", "moved/demo", 10)
    assert config.plugins == [], "a saved run never says what may be imported"
    assert typed == ["resume=moved/demo"]


TB = {"_target_": "halos.hooks.trackers.TensorBoard"}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["train.eval_every=3"], {"train.eval_every": [100, 3]}),
        (
            ["train={log_every: 5}", "train.eval_at_start=false"],
            {"train.log_every": [1, 5], "train.eval_at_start": [True, False]},
        ),
        (["++train.activation_checkpointing=true"], {"train.activation_checkpointing": [None, True]}),
        (["train.microbatch_size=2"], {"train.microbatch_size": [None, 2]}),
        (["checkpoint.every=7", "checkpoint.keep_last=5"], {"checkpoint.every": [100, 7], "checkpoint.keep_last": [2, 5]}),
        (["checkpoint=default"], {}),
        (["cache_dir=elsewhere"], {"cache_dir": ["CACHE", "elsewhere"]}),
        (["objective.metric=rewards/margins"], {"objective.metric": ["rewards/accuracies", "rewards/margins"]}),
        (["train.early_stopping=3", "train.eval_every=3"], {"train.early_stopping": [None, 3], "train.eval_every": [100, 3]}),
        (["+hooks.tb._target_=halos.hooks.trackers.TensorBoard"], {"hooks.tb": [None, TB]}),
        (["hooks.tb._target_=halos.hooks.trackers.TensorBoard"], {"hooks.tb": [None, TB]}),
        (["logging=tensorboard"], {"hooks.tensorboard": [None, TB]}),
        (["logging=none"], {}),
        (["plugins=[json]"], {}),
        (["loss.beta=1e-1", "train.steps=10", "seed=0", "exp_name=demo", "data.train=[{path: arithmetic, split: train}]"], {}),
    ],
    ids=lambda part: str(part)[:50],
)
def test_keys_that_affect_no_step_may_be_overridden_on_resume(cli, build, demo, words, changed):
    status, _, err = cli("resume=moved/demo", *words)
    assert status == 0
    assert ("cache_dir=" in err and "is not used" in err) if words == ["cache_dir=elsewhere"] else err == ""
    given = {
        key: ["CACHE" if "cache" in str(old) and key == "cache_dir" else old, new] for key, (old, new) in build.changed.items()
    }
    assert given == changed


def test_a_checkpoint_may_be_named(cli, build, demo):
    path = "moved/demo/checkpoints/step-00000005"
    assert cli(f"resume={path}")[0] == 0
    config = build.calls[0][0]
    assert (config.resume, config.run_dir) == (path, "moved/demo")


REFUSED = [
    "loss.beta=0.3", "seed=1", "data.train=[org/x]", "data.eval=[]", "data.score=all", "train.batch_size=8",
    "model.dtype=bfloat16",
    "model.revision=v2", "model.name_or_path=org/x", "reference.name_or_path=org/x", "optim.lr=1", "optim.name=sgd",
    "schedule.name=constant", "schedule.final=0.1", "train.max_length=64", "train.truncation=error", "train.precision=bfloat16",
    "train.steps=20", "train.epochs=2", "train.max_grad_norm=null", "model.chat_template=x",
]  # fmt: skip


@pytest.mark.parametrize("word", REFUSED)
def test_changes_of_the_mathematics_are_refused_by_name(refused, demo, word):
    err = refused("resume=moved/demo", word, "train.log_every=3")
    assert word.partition("=")[0].removesuffix(".name") in err
    assert "resume_changes=allow" in err
    assert "log_every" not in err
    assert os.listdir("moved/demo/attempts") == []


def test_all_refused_changes_are_in_one_message(refused, demo):
    words = [word for word in REFUSED if not word.startswith("schedule.name")]  # under a constant rate steps may be added
    err = refused("resume=moved/demo", *words)
    for word in words:
        assert word.partition("=")[0].removesuffix(".name") in err


def test_changes_of_the_mathematics_are_made_if_allowed(cli, build, demo, refused):
    assert cli("resume=moved/demo", "loss.beta=0.3", "train.steps=20", "resume_changes=allow")[0] == 0
    assert build.changed == {"loss.beta": [0.1, 0.3], "train.steps": [10, 20]}
    assert build.calls.pop()[0].loss["beta"] == 0.3
    assert "no effect without resume=" in refused(*RUN, "resume_changes=allow")


@pytest.mark.parametrize("changes", ["refuse", "allow"])
def test_no_resume_turns_full_training_into_lora(changes, refused, demo):
    """A checkpoint of the one has no weights for the other, whatever is allowed."""
    told = refused("resume=moved/demo", "peft.name=lora", f"resume_changes={changes}")
    assert "peft.name 'none' -> 'lora': the checkpoints of moved/demo hold a whole model and no adapter" in told
    assert "allow" not in told, "a way that would be refused in turn"


def test_what_former_attempts_changed_stays_changed(cli, build, demo):
    demo.start_attempt({"overrides": []})
    demo.start_attempt({"changed": {"train.log_every": [1, 5], "loss.beta": [0.1, 0.3], "hooks.tb": [None, TB]}})
    demo.start_attempt({"changed": {"train.log_every": [5, 7]}})
    before = demo.config.read_bytes()
    assert cli("resume=moved/demo", "loss.beta=0.3")[0] == 0
    config = build.calls.pop()[0]
    assert (config.train.log_every, config.loss["beta"], config.hooks, build.changed) == (7, 0.3, {"tb": TB}, {})
    assert cli("resume=moved/demo", "train.log_every=1", "logging=none", "~hooks.tb")[0] == 0
    assert build.changed == {"train.log_every": [7, 1], "hooks.tb": [TB, None]}
    assert demo.config.read_bytes() == before


def test_a_tracker_may_be_chosen_again_and_other_hooks_stay(cli, build, demo):
    own = {"_target_": "halos.hooks.trackers.TensorBoard"}
    mine = {"_target_": "halos.hooks.trackers.Wandb", "project": "mine", "entity": None, "mode": "offline"}
    demo.start_attempt({"changed": {"hooks.own": [None, own], "hooks.wandb": [None, mine]}})
    assert cli("resume=moved/demo", "logging=wandb")[0] == 0
    assert build.changed == {}
    assert cli("resume=moved/demo", "logging=tensorboard")[0] == 0
    assert build.changed == {"hooks.wandb": [mine, None], "hooks.tensorboard": [None, TB]}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["loss=kto"], "loss=kto: resume= keeps the choices of moved/demo"),
        (["peft=lora"], "peft=lora: resume="),
        (["exp_name=other"], "model.name_or_path=moved/demo/FINAL, which is there once this run has finished"),
        (["run_dir=other"], "run_dir=other: resume="),
        (["overwrite=true"], "overwrite=true: resume="),
        (["train.stepz=3"], "did you mean train.steps?"),
        (["loss.betta=3"], "did you mean beta?"),
        (["+train.steps=3"], "write train.steps=3"),
        (["train.steps=no"], "train.steps takes a whole number"),
        (["train.steps=1,2"], "-m"),
        (["checkpoint=nope"], "checkpoint has no choice"),
        (["hydra.verbose=true"], "hydra.verbose=true: resume="),
    ],
)
def test_overrides_that_a_resume_cannot_apply_are_refused(refused, demo, words, part):
    assert part in refused("resume=moved/demo", *words)


def test_a_missing_run_or_checkpoint_names_those_that_are_there(refused, demo):
    assert "did you mean moved/demo?" in refused("resume=moved/dmo")
    assert "step-00000005" in refused("resume=moved/demo/checkpoints/step-00000007")


def test_a_strangers_run_runs_no_code_and_reads_no_environment(refused, cli, build, demo):
    text = demo.config.read_text()
    demo.config.write_text(text.replace("chat_template: null", "chat_template: ${oc.env:MY_TOKEN}"))
    assert cli("resume=moved/demo")[0] == 0
    assert build.calls.pop()[0].model.chat_template == "${oc.env:MY_TOKEN}"
    demo.config.write_text(text.replace("halos.losses.dpo.dpo", "antigravity.geohash"))
    assert "plugins=[antigravity]" in refused("resume=moved/demo")
    assert "antigravity" not in sys.modules
    demo.config.write_text("loss: !!python/object/apply:os.system [x]")
    assert "cannot be read" in refused("resume=moved/demo")


HOSTILE = [
    ("hooks.x", {"_target_": "os.system", "command": "touch pwned"}, "plugins=[os]"),
    ("checkpoint", {"_target_": "antigravity.Hook"}, "plugins=[antigravity]"),
    ("loss", {"_target_": "subprocess.run", "args": "touch pwned"}, "plugins=[subprocess]"),
    ("hooks.x", {"_target_": "halos.rundir.shutil.rmtree"}, "no module halos.rundir.shutil"),
    ("hooks.x", {"_target_": "halos.confined.shutil"}, "is no hook"),
    ("hooks.x", {"_target_": "halos.rundir.is_run"}, "is no hook"),
    ("loss", {"_target_": "halos.rundir.RunDir"}, "is no loss"),
    ("hooks.x", {"_target_": "halos.hooks.trackers.TensorBoard", "_args_": ["x"]}, "takes no '_args_'"),
    ("plugins", ["antigravity"], None),
    ("overwrite", True, None),
    ("resume_changes", "allow", None),
]


@pytest.mark.parametrize("where", ["config.yaml", "attempts"])
@pytest.mark.parametrize(("key", "planted", "part"), HOSTILE, ids=lambda part: str(part)[:40])
def test_code_planted_in_a_run_is_not_run(refused, cli, build, demo, where, key, planted, part):
    if where == "attempts":
        demo.start_attempt({"changed": {key: [None, planted]}})
    else:
        settings = yaml.safe_load(demo.config.read_text())
        resume_policy.apply_changes(settings, {key: [None, planted]})
        demo.config.write_text(yaml.safe_dump(settings))
    if part:
        assert part in refused("resume=moved/demo")
    else:
        assert cli("resume=moved/demo")[0] == 0
        config = build.calls.pop()[0]
        assert (config.plugins, config.overwrite, config.resume_changes) == ([], False, "refuse")
    assert "antigravity" not in sys.modules
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "config.yaml holds no configuration"),
        ("[1, 2]", "config.yaml holds no configuration"),
        ("a: [", "config.yaml cannot be read"),
        (b"\xff\xfe", "config.yaml cannot be read"),
        ("seed: 0", "config.yaml has no loss, which this version needs: pass loss=VALUE"),
        ("train: {stepz: 3}", "config.yaml does not fit this version: there is no key 'train.stepz'; did you mean train.steps?"),
        ("train: {steps: many}", "config.yaml does not fit this version: train.steps"),
        ("train: 3", "config.yaml does not fit this version: train"),
    ],
)
def test_a_broken_config_is_one_message_that_names_the_file(refused, demo, text, part):
    demo.config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"moved/demo/{part}" in refused("resume=moved/demo")


@pytest.mark.parametrize("text", ["a: [", "changed: 3", "changed: {train.steps: 3}", "changed: {no.such.place: [1, 2]}"])
def test_a_broken_attempt_is_one_message_that_names_the_file(refused, demo, text):
    demo.start_attempt({})
    (demo.path / "attempts" / "000.yaml").write_text(text)
    assert "moved/demo/attempts/000.yaml cannot be read" in refused("resume=moved/demo")


def test_a_key_added_since_the_run_can_be_overridden(refused, cli, build, demo):
    settings = yaml.safe_load(demo.config.read_text())
    del settings["train"]["max_grad_norm"]
    demo.config.write_text(yaml.safe_dump(settings))
    assert "has no train.max_grad_norm" in refused("resume=moved/demo")
    assert cli("resume=moved/demo", "train.max_grad_norm=1")[0] == 0
    assert build.changed == {"train.max_grad_norm": [None, 1.0]}


# --- packages of the user's own

OWN = """
from halos.hooks.base import Hook
class Quiet(Hook):
    def __init__(self, *, every: int = 3): ...
class Other:
    def on_step(self, run, metrics): ...
"""


@pytest.fixture
def own(monkeypatch):
    """A package in the current directory, which Python does not look into by itself."""
    Path("myown").mkdir()
    Path("myown/hooks.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "myown"]:
        del sys.modules[name]


def test_a_hook_of_the_users_own_joins_at_the_start_and_at_a_resume(cli, build, own, demo):
    given = {"_target_": "myown.hooks.Quiet", "every": 2}
    for start in (RUN, ("resume=moved/demo",)):
        for sign in ("+", ""):
            words = [f"{sign}hooks.mine={{_target_: myown.hooks.Quiet, every: 2}}", "plugins=[myown]"]
            assert cli(*start, *words)[0::2] == (0, "")
            assert build.calls.pop()[0].hooks == {"mine": given}
    demo.start_attempt({"changed": build.changed})
    assert cli("resume=moved/demo", "plugins=[myown]", "+hooks.mine={_target_: myown.hooks.Quiet, every: 2}")[0] == 0
    assert (build.calls.pop()[0].hooks, build.changed) == ({"mine": given}, {})


@pytest.mark.parametrize("start", [RUN, ("resume=moved/demo",)], ids=["start", "resume"])
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["hooks.mine._target_=myown.hooks.Quiet"], "if you trust that package, add plugins=[myown]"),
        (["hooks.mine._target_=myown.hooks.Quiet", "plugins=[yourown]"], "plugins names 'yourown', which Python does not find"),
        (["plugins=['../x']"], "which is no package"),
        (["plugins=[[1]]"], "which is no package"),
        (["hooks.mine._target_=myown.hoks.Quiet", "plugins=[myown]"], "there is no module myown.hoks"),
        (["hooks.mine._target_=myown.hooks.Quit", "plugins=[myown]"], "myown.hooks has no 'Quit'; it has Other, Quiet"),
        (["hooks.mine._target_=myown.hooks.Other", "plugins=[myown]"], "is no hook: derive a class from halos.hooks.base.Hook"),
        (["hooks.mine={_target_: myown.hooks.Quiet, evry: 2}", "plugins=[myown]"], "takes no 'evry'; it takes every"),
        (
            ["checkpoint._target_=myown.hooks.Quiet", "plugins=[myown]"],
            "derive a class from halos.hooks.checkpoint.CheckpointHook",
        ),
    ],
)
def test_mistakes_in_a_hook_are_one_message(refused, own, demo, start, words, part):
    assert part in refused(*start, *words)


# --- help


def _alone(*words):
    """A real process that never imports torch: what makes --help quick can be counted, where seconds depend on the machine."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['train.py', *words]!r}\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'matplotlib'} & set(sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_needs_nothing_large_and_shows_commands_choices_and_keys():
    done = _alone("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("python train.py loss=dpo", "resume=", "loss: aot", "model: gemma", "batch_size: 64", "Exit status"):
        assert part in done.stdout


def test_most_mistakes_are_reported_without_torch():
    done = _alone("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=x", "train.batch_size=0")
    assert done.returncode == 2
    assert done.stderr == "error: train.batch_size takes a whole number (at least 1), not 0\n"


def test_help_and_config_can_be_shown_for_a_choice(cli):
    status, out, err = cli("--cfg", "job", "loss=kto", "loss.beta=0.3", "-p", "loss")
    assert (status, err) == (0, "")
    assert "beta: 0.3" in out
    assert "desirable_weight" in cli("loss=kto", "--help")[1]


def test_a_users_own_directory_adds_choices(cli, build, refused):
    Path("mine/loss").mkdir(parents=True)
    Path("mine/loss/soft.yaml").write_text(
        "# @package _global_\ndefaults:\n  - dpo\n  - _self_\nseed: 7\nloss:\n  beta: 0.01\n", encoding="utf-8"
    )
    assert cli("--config-dir", "mine", "loss=soft", *RUN[1:])[0] == 0
    config = build.calls.pop()[0]
    assert (config.loss["beta"], config.seed) == (0.01, 7), "a choice overrides the values of config.yaml"
    assert config.loss_choice == "soft"
    Path("mine/loss/bad.yaml").write_text("# @package _global_\nloss: [", encoding="utf-8")
    assert "bad" in refused("--config-dir", "mine", "loss=bad", *RUN[1:])
