"""Rounds: sample from the policy, label, train, and the next round samples from what was saved.

The driver trains nothing itself. Each stage is a command that writes one file or directory, whole; a run that was killed goes
on at the first that is not there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos import __version__
from halos.checkpoint.commit import staged, sweep
from halos.checkpoint.find import checkpoints
from halos.config import saved
from halos.config.bind import LossSpec, bind_hook, bind_loss
from halos.config.changes import Change
from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import Hook
from halos.online import feedback, measure
from halos.online.prompts import for_round, held_out, read_prompts
from halos.online.records import EVAL, TRAIN, Row, read, read_meta, write
from halos.online.stages import WRONG_INPUT, RefusedError, StageError, Stages, StoppedError, await_orphans, config_file
from halos.rundir import RunDir, is_run, write_whole
from halos.types import Labelled, Pair, TokenLogps

log = logging.getLogger(__name__)

FINISHED, FAILED, STOPPED = 0, 1, 75
WORDS = "online.json"  # what each round's training is given
KINDS = {Pair: feedback.PAIRWISE, Labelled: feedback.BINARY, TokenLogps: feedback.BINARY}


def run(config: Config, inner: Config, words: Sequence[str], typed: Sequence[str], changed: Sequence[Change] = ()) -> int:
    """All rounds, or those that are left; the exit status.

    `inner` is the configuration of a round's training and `words` what is typed for it. Raises UserError.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "loss=online starts an accelerate launch of its own for every stage: python train.py loss=online"
            " online.config_file=launch/accelerate/ddp.yaml (or cpu2, ...)"
        )
    if config.resume:
        _refuse_untyped(config, typed)
    walk = Walk(config, inner, words)
    walk.check()
    if config.dry_run:
        return walk.rehearse()
    directory = RunDir(config.run_dir)
    with directory.lock() as lock:
        lock.refuse_held()
        if config.resume:
            directory.open()
        else:
            directory.refuse_occupied(overwrite=config.overwrite)
        directory.path.mkdir(parents=True, exist_ok=True)
        if line := lock.acquire(directory.next_attempt()):
            log.warning(line)
        return walk.go(typed, changed)


class Walk:
    """What hooks see of it: `config`, `directory`, `main`, and `step`, the number of the round."""

    def __init__(self, config: Config, inner: Config, words: Sequence[str]) -> None:
        assert config.online is not None
        self.config, self.inner, self.online = config, inner, config.online
        # what may be imported is typed on this command, and never read from a saved run
        self.words = [word for word in words if not word.lstrip("+").startswith("plugins=")]
        self.words += [f"plugins=[{','.join(config.plugins)}]"] if config.plugins else []
        self.directory, self.stages = RunDir(config.run_dir), Stages(config)
        self.loss: LossSpec = bind_loss(inner.loss, config.plugins)
        self.main, self.step = True, 0
        self.hooks: dict[str, Hook] = {}
        self.metrics: dict[str, Any] = {}

    # --- before anything starts ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises UserError for what could not work, before a stage finds it out."""
        online, labeller = self.online, self.online.labeller
        config_file(online) if online.config_file or self.stages.processes > 1 else None
        if online.samples_per_prompt < 2 and self.kind == feedback.PAIRWISE:
            raise UserError(
                f"online.samples_per_prompt={online.samples_per_prompt}: online.loss={online.loss} learns from pairs: 2 or more"
            )
        if labeller.name == "function":
            from halos.online.labellers.functions import parts_of

            parts_of(labeller.functions, self.config.plugins)
        elif labeller.model is None:
            what = "its directory or hub id" if labeller.name == "reward_model" else "the judge's name at its API"
            raise UserError(f"online.labeller.model is missing: {what}")
        if labeller.name == "judge" and not os.environ.get("OPENAI_API_KEY"):
            raise UserError("the judge's key is read from the environment, and OPENAI_API_KEY is not set")
        model = str(labeller.model)
        if (
            labeller.name == "reward_model"
            and not Path(model).is_dir()
            and (model.count("/") != 1 or Path(model).parent.is_dir())
        ):
            raise UserError(f"online.labeller.model: there is no directory {model}")
        if online.sampler.max_new_tokens >= self.inner.train.max_length:
            raise UserError(
                f"online.sampler.max_new_tokens={online.sampler.max_new_tokens} leaves no room for a prompt within"
                f" train.max_length={self.inner.train.max_length}"
            )
        if labeller.pairwise and (labeller.name != "judge" or self.kind != feedback.PAIRWISE):
            raise UserError("online.labeller.pairwise=true is of a judge, and of losses that learn from pairs, such as dpo")
        feedback.check_threshold(self.kind, online.feedback.threshold)
        self.prompts = read_prompts(self.config.data.train, "train")
        self.exam = read_prompts(self.config.data.eval, "eval") if self.config.data.eval and online.eval_prompts else []
        if not self.prompts:
            raise UserError("data.train has no prompts")

    @property
    def kind(self) -> str:
        """Of feedback, which the loss learns from."""
        kind = self.online.feedback.kind
        return kind if kind != "auto" else KINDS.get(self.loss.inputs, feedback.SCALAR)

    def rehearse(self) -> int:
        online = self.online
        each = min(online.prompts_per_round, len(self.prompts))
        held = min(online.eval_prompts, len(self.exam))
        samples = online.samples_per_prompt
        log.info("%d rounds of %d prompts (of %d), %d samples of each", online.rounds, each, len(self.prompts), samples)
        log.info("%d held-out prompts", held)
        log.info("%s feedback by %s for loss=%s", self.kind, online.labeller.name, online.loss)
        log.info("training of each round: python train.py %s", " ".join(self.words))
        log.info("everything fits together, nothing was started")
        return FINISHED

    # --- the walk --------------------------------------------------------------------------------------------------------

    def go(self, typed: Sequence[str], changed: Sequence[Change]) -> int:
        self._begin(typed, changed)
        self.stages.listen()
        status, note = "failed", None
        try:
            for hook in self.hooks.values():
                hook.on_start(self)  # type: ignore[arg-type]
            kept = {name: hook.state_dict() for name, hook in self.hooks.items()}
            write_whole(self.directory.path / "hooks.json", json.dumps(kept) + "\n")
            for number in range(self.online.rounds):
                self.step = number
                Round(self, number).go()
                self._clean(number)
            self.step = self.online.rounds
            self._finish()
            status = "finished"
        except StoppedError as stopped:
            status, note = "stopped", str(stopped)
        except RefusedError as error:
            status, note = "refused", str(error)
        except StageError as error:
            note = str(error)
            log.error("failed: %s", error)
        except BaseException as error:
            note = f"{type(error).__name__}: {error}"
            raise
        finally:
            for hook in self.hooks.values():
                hook.on_end(self)  # type: ignore[arg-type]
            ended = "failed" if status == "refused" else status
            self.directory.write_result(ended, self.step, self.metrics, reason=note)  # type: ignore[arg-type]
        if status == "finished":
            log.info("finished: %s", self.directory.final)
        elif status == "stopped":
            log.info("stopped: %s; go on with: python train.py resume=%s", note, self.directory.path)
        return {"finished": FINISHED, "stopped": STOPPED, "refused": WRONG_INPUT}.get(status, FAILED)

    def _begin(self, typed: Sequence[str], changed: Sequence[Change]) -> None:
        directory, resumed = self.directory, bool(self.config.resume)
        if not resumed:
            directory.create(overwrite=self.config.overwrite)
            directory.write_config(saved.dump(self.config))
        write_whole(directory.path / WORDS, json.dumps({"words": self.words}, indent=1) + "\n")
        handler = logging.FileHandler(directory.log_of(0), delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("halos").addHandler(handler)
        sweep(directory.path)
        altered = {"changed": {change.key: [change.old, change.new] for change in changed}} if changed else {}
        directory.start_attempt({"overrides": list(typed), "halos": __version__, "total_steps": self.online.rounds, **altered})
        self.hooks = {name: bind_hook(f"hooks.{name}", given, self.config.plugins)() for name, given in self.config.hooks.items()}
        state = directory.path / "hooks.json"
        if state.is_file():
            for name, kept in json.loads(state.read_text()).items():
                if name in self.hooks:
                    self.hooks[name].load_state_dict(kept)
        directory.write_result("running", 0, {})
        online = self.online
        log.info("online     %s, %s feedback by %s", self.loss.name, self.kind, online.labeller.name)
        log.info("prompts    %d, %d a round; %d held out", len(self.prompts), min(online.prompts_per_round, len(self.prompts)),
                 min(online.eval_prompts, len(self.exam)))  # fmt: skip
        log.info("run        %s", directory.path)

    def place(self, number: int) -> Path:
        return self.directory.path / "rounds" / f"{number:03d}"

    def start(self) -> str:
        """The first policy."""
        assert self.config.model.name_or_path is not None
        return self.config.model.name_or_path

    def policy(self, number: int) -> str:
        """What round `number` samples from, and its training goes on from."""
        return self.start() if number == 0 else str(self.place(number - 1) / "train" / "FINAL")

    def held_out(self) -> list[Row]:
        return held_out(self.exam, count=self.online.eval_prompts, seed=self.config.seed)

    def record(self, number: int, train: Mapping[str, Any], held: Mapping[str, Any]) -> None:
        """A round's rows of metrics.jsonl, in the place of any that an earlier attempt has left."""
        self.directory.truncate_metrics(number - 1)
        rows = [{"step": number, "split": split, **row} for split, row in ((TRAIN, train), (EVAL, held)) if row]
        for row in rows:
            self.directory.append_metrics(row)
            for hook in self.hooks.values():
                hook.on_eval(self, row)  # type: ignore[arg-type]
        self.metrics = {name: value for name, value in {**train, **held}.items() if not name.startswith("seconds")}
        shown = [f"{name} {value:.4g}" for name, value in train.items() if name in SHOWN]
        shown += [f"held-out {name} {value:.4g}" for name, value in held.items() if name in ("reward", "win_rate")]
        log.info("round %d of %d: %s", number, self.online.rounds, ", ".join(shown))

    def _clean(self, number: int) -> None:
        """The weights of rounds that nobody needs any more; what was sampled and measured stays."""
        if self.online.keep_rounds is None:
            return
        for old in range(number + 1 - self.online.keep_rounds):
            for name in ("FINAL", "checkpoints", "rollouts"):
                shutil.rmtree(self.place(old) / "train" / name, ignore_errors=True)

    def _finish(self) -> None:
        """The last policy's exam, and FINAL."""
        last = self.place(self.online.rounds - 1) / "train" / "FINAL"
        if self.exam:
            exam = Round(self, self.online.rounds)
            exam.place = self.directory.path / "exam"
            if read_meta(exam.place / "samples.jsonl").get("request", {}).get("model") != str(last):
                shutil.rmtree(exam.place, ignore_errors=True)  # of a walk that was shorter
            exam.examine()
        with staged(self.directory.final, main=True, facts={"rounds": self.online.rounds}) as hidden:
            shutil.copytree(last, hidden, dirs_exist_ok=True, copy_function=_link, ignore=shutil.ignore_patterns("manifest.json"))


def _refuse_untyped(config: Config, typed: Sequence[str]) -> None:
    """Raises UserError where a saved run names a program that would be run, or an address that the key would be sent to.

    A run directory may be a stranger's.
    """
    online = config.online
    assert online is not None
    used = {
        "online.sampler.python": online.sampler.python if online.sampler.name == "vllm" else None,
        "online.sampler.url": online.sampler.url if online.sampler.name != "hf" else None,
        "online.labeller.url": online.labeller.url if online.labeller.name == "judge" else None,
    }
    for key, value in used.items():
        if value is not None and not any(word.lstrip("+").startswith(f"{key}=") for word in typed):
            raise UserError(
                f"{config.run_dir} names {key}={value}, and what is run and where keys are sent is never taken from a saved run:"
                " type it again"
            )


SHOWN = ("reward", "kl", "length", "unique", "cost")


class Round:
    """One round; its stages are done when their files are there."""

    def __init__(self, walk: Walk, number: int) -> None:
        self.walk, self.number, self.place = walk, number, walk.place(number)
        self.facts: dict[str, Any] = {}

    def go(self) -> None:
        """Prompts, samples, feedback, training. A round that is done is not looked at again."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.facts = self._read()
        if self.facts.get("done"):
            self.walk.metrics = self.facts.get("metrics", {})
            return
        began, fresh = time.perf_counter(), not (self.place / "prompts.jsonl").is_file()
        self._prompts(with_training=True)
        self._sample()
        self._label()
        self._train()
        self._note(wall=round(time.perf_counter() - began, 2), whole=fresh)
        train, held = self._measure()
        self._show(train)
        self.walk.record(self.number, train, held)
        self._note(done=True, metrics=self.walk.metrics)

    def examine(self) -> None:
        """Held-out prompts alone."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.facts = self._read()
        self._prompts(with_training=False)
        self._sample()
        self._label()
        _, held = self._measure()
        self._show({})
        self.walk.record(self.number, {}, held)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self.place / "round.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        return {"round": self.number, "stages": {}, "whole": False, "wall": 0.0, **(found if isinstance(found, dict) else {})}

    def _note(self, **facts: Any) -> None:
        self.facts |= facts
        write_whole(self.place / "round.json", json.dumps(self.facts, indent=1) + "\n")

    def _stage(self, name: str, command: Sequence[str]) -> None:
        """One command, timed as a whole, over all starts."""
        began = time.perf_counter()
        self.walk.stages.run(command, self.place / "logs" / f"{name}.log")
        spent = self.facts["stages"].get(name, {}).get("wall", 0.0) + time.perf_counter() - began
        self.facts["stages"][name] = {"wall": round(spent, 2)}
        self._note()

    def _prompts(self, *, with_training: bool) -> None:
        path, walk = self.place / "prompts.jsonl", self.walk
        if path.is_file():
            return
        online = walk.online
        chosen = for_round(walk.prompts, self.number, count=online.prompts_per_round, samples=online.samples_per_prompt,
                           seed=walk.config.seed) if with_training else []  # fmt: skip
        write(path, [*chosen, *walk.held_out()])

    def _sample(self) -> None:
        path, walk = self.place / "samples.jsonl", self.walk
        if path.is_file():
            return
        seed = walk.config.seed * 1_000_003 + self.number
        policy = walk.policy(self.number)
        command = walk.stages.sample(policy, self.place / "prompts.jsonl", path, seed=seed,
                                     max_length=walk.inner.train.max_length, reference=walk.start())  # fmt: skip
        self._note(policy=policy)
        self._stage("sample", command)

    def _label(self) -> None:
        path, walk = self.place / "feedback.jsonl", self.walk
        if path.is_file():
            return
        first = walk.place(0) / "samples.jsonl"
        command = walk.stages.label(
            self.place / "samples.jsonl", path, kind=walk.kind, scores=self.place / "scores.jsonl",
            cache=walk.directory.path / "judge.jsonl", against=first if self.number else None,
        )  # fmt: skip
        self._stage("label", command)

    def _train(self) -> None:
        run, walk = RunDir(self.place / "train"), self.walk
        if is_run(run.path) and run.is_finished() and run.final.is_dir():
            return
        rows = read(self.place / "feedback.jsonl")
        if not rows:
            raise UserError(
                f"round {self.number}: there is nothing to learn from: {self._why_nothing()}. Its files are kept in {self.place};"
                " more samples of each prompt, a higher temperature or other prompts would be another run"
            )
        await_orphans(run, log.info)
        self._stage("train", walk.stages.train(self._words(run)))
        if not (run.is_finished() and run.final.is_dir()):
            result = run.read_result() or {}
            raise StageError(f"training of round {self.number} did not finish: {result.get('reason') or result.get('status')}")

    def _why_nothing(self) -> str:
        rows = read(self.place / "scores.jsonl") if (self.place / "scores.jsonl").is_file() else []
        scores = [row.get("reward") for row in rows if row.get("split") != EVAL]
        if scores and all(score is None for score in scores):
            return f"none of {len(scores)} samples has a score ({rows[0].get('problem')})"
        return f"the scores of all samples of a prompt are equal, for every prompt ({len(scores)} samples)"

    def _words(self, run: RunDir) -> list[str]:
        """What is typed for the training of this round."""
        walk, number = self.walk, self.number
        config, inner, online = walk.config, walk.inner, walk.online
        words = [
            *walk.words, f"data.train=[{quoted(self.place / 'feedback.jsonl')}]", "data.eval=[]", f"run_dir={quoted(run.path)}",
            f"exp_name={quoted(f'{config.exp_name}-{number:03d}')}", f"seed={config.seed + number}", "resume=auto",
            f"cache_dir={quoted(config.cache_dir)}",
        ]  # fmt: skip
        if not any(word.lstrip("+").startswith(("train.steps=", "train.epochs=")) for word in walk.words):
            words.append("train.steps=null")  # a bundled model's own number is for whole data sets
        if walk.loss.on_rollouts:
            words.append(f"train.temperature={online.sampler.temperature}")
        if online.carry_optimizer:
            words.append("checkpoint.at_end=true")
        if number:
            words += self._going_on(walk.place(number - 1) / "train", lora=inner.peft.name == "lora")
        return words

    def _going_on(self, before: Path, *, lora: bool) -> list[str]:
        """From the last round's policy; the reference stays at the start unless told otherwise."""
        walk, words = self.walk, []
        last = walk.online.reference == "last"
        if lora:
            words += [f"peft.init_from={quoted(before / 'FINAL' / 'adapter')}"]
            other = before / "FINAL" if last else None  # its own base is the start
        else:
            words += [f"model.name_or_path={quoted(before / 'FINAL')}"]
            other = None if last else walk.start()
        if walk.loss.needs_reference and other is not None:
            words += [f"reference.name_or_path={quoted(other)}"]
            if str(other) == walk.start() and walk.config.model.revision is not None:
                words += [f"reference.revision={quoted(walk.config.model.revision)}"]
        if walk.online.carry_optimizer:
            words += [f"optim.init_from={quoted(checkpoints(before / 'checkpoints')[-1])}"]
        if (weight := self._kl_weight(before)) is not None:
            words += [f"loss.kl_coefficient={weight}"]
        return words

    def _kl_weight(self, before: Path) -> float | None:
        """Of a KL that follows a target: where the last round has left it."""
        if self.walk.loss.adapt is None or self.walk.loss.settings.get("kl_target") is None:
            return None
        rows = [row for row in RunDir(before).read_metrics() if row.get("kl_coefficient") is not None]
        return float(rows[-1]["kl_coefficient"]) if rows else None

    def _measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rows of metrics.jsonl: what was sampled to train on, and the held-out answers of the policy that sampled."""
        sampled = read_meta(self.place / "samples.jsonl")
        rows = self._scored()
        train = measure.of_samples(rows, split=TRAIN)
        held = measure.of_samples(rows, split=EVAL)
        first = self._first_rows()
        labelled = read_meta(self.place / "scores.jsonl") or read_meta(self.place / "feedback.jsonl")
        if held and "win_rate" in labelled:
            held["win_rate"] = labelled["win_rate"]
        elif held and (rate := measure.win_rate(rows, first)) is not None:
            held["win_rate"] = rate
        if train:
            train |= {"kl": sampled["kl"]} if "kl" in sampled else {}
            cost = sum(row.get("cost") or 0.0 for row in rows)
            train |= {"cost": cost, "without_score": sum(row.get("reward") is None for row in rows) if rows else 0}
            stages = {name: stage["wall"] for name, stage in self.facts["stages"].items()}
            train |= {f"seconds/{name}": spent for name, spent in stages.items()}
            if self.facts["whole"]:  # of a round that was gone on with, what lay between its starts is nobody's
                train["seconds/other"] = round(self.facts["wall"] - sum(stages.values()), 2)
            train |= {"prompts_too_long": sampled.get("prompts_too_long", 0), "rows": len(read(self.place / "feedback.jsonl"))}
            train |= self._of_training()
        return train, held

    def _of_training(self) -> dict[str, float]:
        """The loss over the round's training, in the mean."""
        rows = [row for row in RunDir(self.place / "train").read_metrics() if row["split"] == TRAIN]
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        return {"loss": sum(losses) / len(losses)} if losses else {}

    def _scored(self) -> list[Row]:
        """Every sample, with its score where the labeller gives scores."""
        path = self.place / "scores.jsonl"
        rows = read(path) if path.is_file() else []
        return rows if rows and "output" in rows[0] else read(self.place / "samples.jsonl")

    def _first_rows(self) -> list[Row]:
        path = self.walk.place(0) / "scores.jsonl"
        return [row for row in read(path) if "output" in row] if path.is_file() else []

    def _show(self, train: Mapping[str, Any]) -> None:
        count = self.walk.online.show
        if count:
            title = f"{self.walk.config.exp_name}, round {self.number}"
            rows = measure.examples(self._scored(), count)
            measure.write_examples(self.place, rows, title)
            for hook in self.walk.hooks.values():
                hook.on_examples(self.walk, rows)  # type: ignore[arg-type]


def quoted(value: Any) -> str:
    """A word as Hydra's grammar takes it, whatever is in it."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _link(source: str, target: str) -> str:
    """The same bytes in both places, where the file system can; nothing of a FINAL is ever written into."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def stored_words(run: Path) -> list[str]:
    """What a saved run's training is given. Raises UserError where that cannot be read."""
    path = run / WORDS
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["words"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path} holds no words")
    return words
