"""Compose, check, build, fit. The only file that imports hydra.

python train.py loss=dpo model=tiny data=arithmetic exp_name=demo
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from halos.config import changes, gate, saved
from halos.config.changes import Change, Past
from halos.config.overrides import Choices, Typed, check_choices, no_inner_loss, quote_nested, settle, unreadable
from halos.config.schema import Config
from halos.config.secrets import redact, refuse_saved_addresses, refuse_secrets
from halos.config.suggest import kind_of
from halos.distributed.children import leave
from halos.distributed.environment import number_of, refuse_half_launched, world_size
from halos.distributed.signals import AGAIN, ASKING, as_before, leave_when_told
from halos.errors import JobsFailedError, UserError, printable, read_enough
from halos.rundir import RunDir, is_run, job_name, step_of

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "launch"))  # hydra_plugins/ in it is where Hydra looks for launchers
VERSION = "1.3"  # of Hydra's behaviour
FAILED, WRONG_INPUT = 1, 2
COMMANDS = ("resume", "resume_changes", "overwrite", "dry_run")  # of one command
OWN = {  # of a run that is a workflow, and not of the training within it
    "loss", "online", "exp_name", "output_root", "run_dir", "data", "objective", "hooks", "logging", *COMMANDS,
}  # fmt: skip
AUTO = "auto"  # resume=auto: go on with the run of this name where there is one, else begin it
PLUGINS = {"optuna": "hydra-optuna-sweeper", "submitit": "hydra-submitit-launcher"}  # what pip calls them
SEEDED = ("tpe", "random", "cmaes", "nsgaii", "motpe")  # Optuna's samplers that draw
CHOSEN_AGAIN = ("logging", "checkpoint")  # groups that change no step of a run
Composer = Callable[[list[str]], DictConfig]


def main() -> None:
    """Ends with the run's exit status."""
    leave_when_told()
    try:
        leave(begin(sys.argv[1:]))
    except UserError as error:
        leave(refuse(error))
    except JobsFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(read_enough())


def refuse(error: UserError) -> int:
    """One message a host. The other ranks wait, so that the launcher does not end the one that speaks before it has."""
    if number_of("LOCAL_RANK", 0):
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)  # from the launcher, once the other has left
        time.sleep(2)
    else:
        print(f"error: {printable(redact(str(error)))}", file=sys.stderr, flush=True)
    return WRONG_INPUT


def start(argv: list[str]) -> int:
    """A command within a process of yours: its exit status. Raises UserError; signals and sys.argv are afterwards as before."""
    with as_before():
        return begin(argv)


def begin(argv: list[str]) -> int:
    """What was typed is checked before Hydra takes over, because Hydra's own errors exit 1 with tracebacks or bad advice."""
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unreadable(unknown[0], "an option that does not exist"))
    flags = [word for word in argv if word not in args.overrides]
    args.overrides = [quote_nested(word) for word in args.overrides]
    if args.hydra_help or args.shell_completion or args.experimental_rerun or (args.help and not args.overrides):
        return enter_hydra(args.overrides + flags)
    multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if multirun and world_size() > 1:
        raise UserError(
            "a sweep cannot run inside accelerate launch, where the second job would fail:"
            " python train.py -m ... hydra/launcher=accelerate starts each job with its own accelerate launch"
        )
    refuse_half_launched()
    refuse_secrets({}, args.overrides)
    places = [(ROOT / (args.config_path or "config")).resolve(), *also_in(args.config_dir)]
    choices, name = list_choices(places), args.config_name or "config"
    typed = [parse(text, choices) for text in args.overrides]
    check_choices(typed, choices, multirun=multirun)
    resume = asked_resume(typed)
    if resume not in (None, AUTO):
        if multirun:
            raise UserError("resume= goes on with one run, so it cannot be part of a sweep: leave out -m")
        with hydra.initialize_config_dir(str(places[0]), version_base=VERSION):
            config, changed = resumed(resume, typed, choices, lambda words: compose(name, [*also_searched(places), *words]))
        return run(config, args.overrides, changed, places) if gate.is_walk(config) else run(config, args.overrides, changed)
    searched = also_searched(places)
    with hydra.initialize_config_dir(str(places[0]), version_base=VERSION):
        known = keys(compose(name, searched + firsts([one for one in typed if one.chooses(choices)])))
        settled = settle(typed, choices, known)
        composer: Composer = lambda words: compose(name, searched + words)  # noqa: E731
        jobs = check_sweep(settled, args.overrides, choices, composer, places) if multirun else []
        if jobs and jobs[0][0].dry_run:
            make_launcher(name, searched + [one.text for one in settled if one.is_hydra])
            return rehearse(jobs, settled, places)
    words = [one.text for one in settled]
    if not multirun:
        return enter_hydra(words + flags, known)
    try:
        shared = f"hydra.job.config.override_dirname.exclude_keys={[one.key for one in settled if not one.is_sweep]}"
        return enter_hydra([*words, *searching(settled, jobs[0][0]), shared, *flags], known)
    finally:
        report([Path(config.run_dir) for config, _ in jobs])


def asked_resume(typed: Sequence[Typed]) -> str | None:
    """The run directory that resume= names, if there is one."""
    named = [one for one in typed if one.key == "resume" and one.values not in ((), (None,))]
    if not named:
        return None
    value = named[0].values[0]
    if len(named) > 1 or type(value) not in (str, int) or value == "":
        given = " ".join(one.text for one in named)
        raise UserError(f"{given}: resume= takes one run directory, for example resume=runs/demo")
    return str(value)


def also_in(config_dir: str | None) -> list[Path]:
    """The user's own directory of configurations."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir: there is no directory {config_dir}")
    return [Path(config_dir).resolve()] if config_dir is not None else []


def also_searched(places: Sequence[Path]) -> list[str]:
    return [f"hydra.searchpath=['file://{place}']" for place in places[1:]]


def list_choices(places: Sequence[Path]) -> Choices:
    """The options of every group of ours."""
    found: dict[str, list[str]] = {"experiment": []}
    for place in places:
        for file in sorted(place.glob("*/**/*.yaml")):
            group = file.parent.relative_to(place).as_posix()
            if group.partition("/")[0] != "hydra":
                found.setdefault(group, []).append(file.stem)
    return found


def parse(text: str, choices: Choices) -> Typed:
    """One override, read by Hydra's parser. A sweep's values are as they would be typed; an interval has none."""
    try:
        override = OverridesParser.create().parse_override(text)
        sweep, given = override.is_sweep_override(), override.value()
        values: tuple[Any, ...] = ()
        if isinstance(given, Glob):
            values = tuple(given.filter(list(choices.get(override.key_or_group, ()))))
        elif sweep and not override.is_interval_sweep():
            values = tuple(override.sweep_string_iterator())
        elif not sweep and override.value_type is not None:
            values = (given,)
    except HydraException as error:
        raise UserError(unreadable(text, str(error).strip().splitlines()[-1])) from error
    sign = text[: len(text) - len(text.lstrip("+~"))]
    return Typed(sign, override.key_or_group, override.package, text.partition("=")[2], values, sweep)


def spoken(typed: Sequence[Typed]) -> list[Typed]:
    """All but an interval, which has no values that could be tried: its key stays at its default."""
    return [one for one in typed if one.values or not one.is_sweep]


def ways(one: Typed) -> list[str]:
    """What is typed, once for each value of a sweep."""
    return [f"{one.sign}{one.key}={value}" for value in one.values] if one.is_sweep else [one.text]


def firsts(typed: Sequence[Typed]) -> list[str]:
    return [ways(one)[0] for one in spoken(typed)]


def all_combinations(typed: Sequence[Typed]) -> list[list[str]]:
    return [list(words) for words in product(*map(ways, spoken(typed)))]


def one_by_one(typed: Sequence[Typed]) -> list[list[str]]:
    """The first values together, then every other one in the place of its first."""
    first = firsts(typed)
    others = [[*first[:i], way, *first[i + 1 :]] for i, one in enumerate(spoken(typed)) for way in ways(one)[1:]]
    return [first, *others]


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra.compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise UserError(explain(error)) from error


def explain(error: Exception, known: Sequence[str] = ()) -> str:
    """Hydra's errors without its search paths, OmegaConf's in our words."""
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return gate.explain(cause, OmegaConf.create(), known)
    lines = str(error).partition("onfig search path")[0].partition("Search path:")[0].strip().splitlines()
    text = "; ".join(line.strip() for line in lines if line.strip() and line.strip() != "C") or type(cause).__name__
    missing = next((package for name, package in PLUGINS.items() if f"er/{name}" in text), None)
    return f"{text}; it comes with the package {missing}: pip install {missing}" if missing else text


def keys(composed: DictConfig) -> list[str]:
    """Every key that is there, dotted, sections included."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}"
            yield from walk(value, f"{prefix}{name}.")

    return list(walk(plain(composed), ""))


def plain(node: Any) -> Any:
    """Lists and mappings of Python, interpolations as they are written."""
    return OmegaConf.to_container(node)


def check_sweep(
    settled: Sequence[Typed], overrides: Sequence[str], choices: Choices, composer: Composer, places: Sequence[Path]
) -> list[tuple[Config, list[str]]]:
    """Every job and what is typed for it, before the first starts. They lie in runs/<exp_name>/, which no single run may use.

    A sweeper that searches tries its values in other combinations than all: of each key every value is checked, by itself.
    """
    searches = any(one.key == "hydra/sweeper" and one.values != ("basic",) for one in settled)
    jobs, checked = one_by_one(settled) if searches else all_combinations(settled), list[tuple[Config, list[str]]]()
    for number, words in enumerate(jobs):
        try:
            config = gate.check(composer(words), overrides, choices)
            if config.online is not None:
                within(config, inner_words(words, config), places)
        except UserError as error:
            told = [word for word, one in zip(words, spoken(settled), strict=True) if one.is_sweep]
            raise UserError(f"{error} (in the job {' '.join(told)})" if told else str(error)) from error
        place = Path(config.run_dir)
        if number == 0 and is_run(place):
            raise UserError(f"{place} holds a single run, and a sweep cannot share its name: choose another exp_name")
        checked.append((config, words))
    return checked


def make_launcher(name: str, words: Sequence[str]) -> None:
    """What starts a sweep's jobs, and what searches for them, made and not begun. Raises UserError for what they do not take."""
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    try:
        composed = hydra.compose(name, list(words), return_hydra_config=True)
        Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=job, config=composed)  # and the launcher
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else UserError(explain(error)) from error


def rehearse(jobs: Sequence[tuple[Config, list[str]]], settled: Sequence[Typed], places: Sequence[Path]) -> int:
    """A sweep's dry run: that of each job, here, one after the other. Raises UserError for the first that would be refused."""
    shared = [one.key for one in settled if not one.is_sweep]
    for number, (config, words) in enumerate(jobs, 1):
        typed = [word for word, one in zip(words, spoken(settled), strict=True) if not one.is_hydra]
        told = " ".join(word for word, one in zip(words, spoken(settled), strict=True) if one.is_sweep)
        print(f"job {number} of {len(jobs)}: {told}", flush=True)
        if not any(one.key == "run_dir" for one in settled):
            config.run_dir = f"{config.run_dir}/{job_name(typed, shared)}"
        try:
            trained = live(config, typed, places) if config.online is not None and config.online.steps is not None else config
            changed = take_up(trained)
            status = run(trained, typed, changed, places) if gate.is_walk(trained) else run(trained, typed, changed)
        except UserError as error:
            raise UserError(f"{error} (in the job {told})") from error
        if status:
            return status
    return 0


def searching(settled: Sequence[Typed], config: Config) -> list[str]:
    """What Optuna is to be told unless it was typed: a seed, so that the same command asks for the same jobs, and which way
    the objective is better."""
    typed = {one.key: one.values for one in settled}
    if typed.get("hydra/sweeper") != ("optuna",):
        return []
    words = []
    sampler = typed.get("hydra/sweeper/sampler", ("tpe",))
    if "hydra.sweeper.sampler.seed" not in typed and sampler and sampler[0] in SEEDED:
        words.append(f"hydra.sweeper.sampler.seed={config.seed}")
    if "hydra.sweeper.direction" not in typed:
        words.append(f"hydra.sweeper.direction={'maximize' if config.objective.mode == 'max' else 'minimize'}")
    return words


def report(places: Sequence[Path]) -> None:
    """A sweep's table and pictures, beside its runs, however it ended."""
    from halos.report.sweep import compare  # here: a run that is no sweep does not need it

    for place in dict.fromkeys(places):
        if not any(map(is_run, place.glob("*"))):
            continue  # no job has come so far
        try:
            text, written = compare(place)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
            continue
        print(text)
        for path in written:
            print(path)


def resumed(path: str, typed: Sequence[Typed], choices: Choices, composer: Composer) -> tuple[Config, list[Change]]:
    """A saved run's own configuration with what was typed on top, and what that changes. Its choices are made, but for those
    that only say what is logged and when it is saved."""
    run_dir = RunDir.at(path)
    run_dir.open()
    source = run_dir.asked_checkpoint(path) or next(iter(run_dir.saves().values()), None)
    settings = last_settings(run_dir)
    for one in typed:
        refuse_on_resume(one, settings, run_dir, choices)
    composed = saved.composed(settings, str(run_dir.path), path)
    choose_again(composed, [one for one in typed if one.chooses(choices)], choices, composer)
    values = [joining(one) for one in typed if not one.chooses(choices)]
    for one in settle(values, choices, keys(composed)):
        parent, _, name = one.key.rpartition(".")
        if one.sign == "~":
            del OmegaConf.select(composed, parent)[name]
        else:
            OmegaConf.update(composed, one.key, one.values[0], merge=True, force_add=True)
    whole = plain(composed)
    wanted = [key for key in changes.CHANGES if not key.startswith("online.") or whole.get("online") is not None]
    if missing := [key for key in wanted if not changes.present(whole, key)]:
        raise UserError(f"{run_dir.config} has no {missing[0]}, which this version needs: type it, {missing[0]}=VALUE")
    config = gate.check(composed, [one.text for one in typed], choices)
    note_cache(settings, config)
    refuse_saved_addresses(config, [one.key for one in typed])
    changed = changes.compare(config, past(run_dir, settings, step_of(source) if source else None))
    changed += altered(run_dir, changed)
    if config.resume_changes == "refuse":
        changes.refuse(changed, run_dir.path)
    return config, changed


def note_cache(settings: dict[str, Any], config: Config) -> None:
    """A cache that is not followed would be made anew, on a disk that may be too small for it."""
    elsewhere = settings.get("cache_dir")
    if elsewhere != config.cache_dir and not number_of("LOCAL_RANK", 0):
        told = (
            f"the saved run's cache_dir={elsewhere} is not followed; this command's is {config.cache_dir} (cache_dir= names one)"
        )
        print(printable(told), file=sys.stderr)


def last_settings(run_dir: RunDir) -> dict[str, Any]:
    """A run's configuration as it was last changed."""
    return saved.load(run_dir.read_config(), run_dir.read_attempts(), str(run_dir.path))


def altered(run_dir: RunDir, changed: Sequence[Change]) -> list[Change]:
    """What stands in the run's files and is not what it wrote there, but for keys that are typed anew."""
    from halos.checkpoint import runfiles  # here: it takes torch, which wrong input need not wait for

    typed = {change.key for change in changed}
    return [change for change in runfiles.changed(run_dir) if change.key not in typed]


def past(run_dir: RunDir, settings: dict[str, Any], oldest: int | None) -> Past:
    by_content = saved.content(run_dir.read_attempts(), str(run_dir.path)) is not None
    return Past(settings, run_dir.path, oldest, by_content)


def refuse_on_resume(one: Typed, settings: dict[str, Any], run_dir: RunDir, choices: Choices) -> None:
    """Raises UserError for what makes another run of it."""
    if one.is_hydra or (one.chooses(choices) and one.key not in CHOSEN_AGAIN):
        raise UserError(
            f"{one.text}: resume= goes on with the choices of {run_dir.path}; type only values, such as train.steps=200"
        )
    elsewhere = one.key in ("exp_name", "output_root", "run_dir") and one.values != (settings.get(one.key),)
    if elsewhere or (one.key == "overwrite" and True in one.values):
        raise UserError(
            f"{one.text}: resume= goes on in {run_dir.path}; for a new run from its model leave out resume= and type"
            f" model.name_or_path={run_dir.final}"
        )


def choose_again(composed: DictConfig, typed: Sequence[Typed], choices: Choices, composer: Composer) -> None:
    """checkpoint= anew; logging= anew, which leaves the hooks alone that no logging choice has."""
    if not typed:
        return
    fresh = plain(composer([one.text for one in typed]))
    if any(one.key == "checkpoint" for one in typed):
        composed.checkpoint = fresh["checkpoint"]
    if any(one.key == "logging" for one in typed):
        trackers = {hook for choice in choices["logging"] for hook in plain(composer([f"logging={choice}"]))["hooks"]}
        kept = {name: hook for name, hook in plain(composed)["hooks"].items() if name not in trackers or name in fresh["hooks"]}
        composed.hooks = kept | {name: hook for name, hook in fresh["hooks"].items() if name not in kept}


def joining(one: Typed) -> Typed:
    """`+hooks.mine=` may be typed again at every resume."""
    return replace(one, sign="++") if one.sign == "+" and kind_of(one.key) == "free" else one


def enter_hydra(words: list[str], known: Sequence[str] = ()) -> int:
    """Hydra as usual, with what was typed settled; `known` are keys that its errors may mean."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would print, and a crash of ours keeps its whole traceback
    sys.argv = [sys.argv[0], *words]
    try:
        hydra.main(version_base=VERSION, config_path=str(ROOT / "config"), config_name="config")(job)()
    except SystemExit as end:  # the only way to hand a status, or what was wrong, on through Hydra
        if isinstance(end.code, UserError):
            raise end.code from None
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        raise cause if isinstance(cause, UserError) else UserError(explain(error, known)) from error
    return 0


def job(composed: DictConfig) -> float | None:
    """One run, or one of a sweep's, which gives back its objective for the sweeper. A sweep's job that failed or was refused
    has said so, and the others go on."""
    settings = HydraConfig.get()
    typed: list[str] = plain(settings.overrides.task)
    multirun = settings.mode == RunMode.MULTIRUN
    if multirun and not any(text.lstrip("+").startswith("run_dir=") for text in typed):
        shared: list[str] = plain(settings.job.config.override_dirname.exclude_keys)
        composed.run_dir = f"{plain(composed)['run_dir']}/{job_name(typed, shared)}"
    places = [Path(source.path) for source in settings.runtime.config_sources if source.schema == "file"]
    config, status = None, WRONG_INPUT
    try:
        config = gate.check(composed, typed, list_choices(places))
        if config.online is not None and config.online.steps is not None:
            config = live(config, typed, places)
        changed = take_up(config) if multirun or config.resume == AUTO else []
        status = run(config, typed, changed, places) if gate.is_walk(config) else run(config, typed, changed)
    except UserError as error:
        if not multirun:
            raise SystemExit(error) from error
        refuse(error)
    if not multirun or status == AGAIN:
        raise SystemExit(status)
    if status or config is None:
        raise JobsFailedError(f"a job of this sweep failed: {' '.join(typed)}")
    return RunDir(config.run_dir).final_value(config.objective.metric)


def take_up(config: Config) -> list[Change]:
    """Have `config` go on with the run of its name where that was begun already; what has changed since. Raises UserError
    where a change would alter what it computes."""
    run_dir, config.resume = RunDir(config.run_dir), None
    if is_run(run_dir.path) and config.overwrite and run_dir.is_finished():
        print(f"overwrite=true: {run_dir.path}, which is finished, is deleted and begun anew", file=sys.stderr)
        return []
    if not is_run(run_dir.path):
        return []
    run_dir.open()
    config.resume, config.overwrite = str(run_dir.path), False
    oldest = next(iter(run_dir.saves()), None)
    changed = changes.compare(config, past(run_dir, last_settings(run_dir), oldest))
    changed += altered(run_dir, changed)
    if config.resume_changes == "refuse":
        changes.refuse(changed, run_dir.path)
    return changed


def inner_words(typed: Sequence[str], config: Config) -> list[str]:
    """What is typed for the training within a workflow, of what was typed for the whole."""
    assert config.online is not None
    passed = [word for word in typed if word.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0] not in OWN]
    return [f"loss={config.online.loss}", *passed, *config.online.overrides]


def inner(config: Config, words: Sequence[str], places: Sequence[Path]) -> DictConfig:
    """The configuration of the training within a workflow. Raises UserError where online.loss names none that it could be."""
    online, choices = config.online, list_choices(places)
    assert online is not None
    known = choices["loss"]
    if online.loss is None:
        raise UserError(f"online.loss is missing: what each round trains with, of {', '.join(known)}")
    if online.loss not in known:
        raise UserError(no_inner_loss(online.loss, known))
    typed = [parse(text, choices) for text in words]
    check_choices(typed, choices, multirun=False)
    started = GlobalHydra.instance().is_initialized()  # by hydra.main, whose composer it is then
    with nullcontext() if started else hydra.initialize_config_dir(str(places[0]), version_base=VERSION):
        searched = also_searched(places)
        chosen = [one.text for one in typed if one.chooses(choices)]
        settled = settle(typed, choices, keys(compose("config", [*searched, *chosen])))
        made = compose("config", [*searched, *[one.text for one in settled]])
    if plain(made).get("online") is not None:
        raise UserError(f"online.loss={online.loss} is a workflow itself: name what each of its rounds trains with, such as dpo")
    return made


def within(config: Config, words: Sequence[str], places: Sequence[Path]) -> Config:
    """The training within online rounds, checked whole: of what it will be given only the feedback is not there yet."""
    made = inner(config, words, places)
    own = {"exp_name": config.exp_name, "run_dir": config.run_dir, "data": asdict(config)["data"], "online": None}
    for name, value in own.items():
        OmegaConf.update(made, name, value, force_add=True)
    return of_policy(config, gate.check(made, words, list_choices(places)))


def of_policy(config: Config, training: Config) -> Config:
    """The training within a workflow. Raises UserError for one that leaves no policy to sample from."""
    from halos.config.bind import bind_loss, refuse_no_policy  # here: they import torch, which the gate has by now

    assert config.online is not None
    refuse_no_policy(str(config.online.loss), bind_loss(training.loss, training.plugins))
    return training


def live(config: Config, typed: Sequence[str], places: Sequence[Path]) -> Config:
    """A live loop as the ordinary run that it is: of online.loss, whose rows come from its own policy."""
    assert config.online is not None
    words, whole = inner_words(typed, config), asdict(config)
    made = inner(config, words, places)
    own = ("exp_name", "output_root", "run_dir", "data", "online", "objective", "hooks", *COMMANDS)
    more = {"train.steps": config.online.steps, "train.temperature": config.online.sampler.temperature}
    for name, value in {**{name: whole[name] for name in own}, **more}.items():
        OmegaConf.update(made, name, value, force_add=True)
    return of_policy(config, gate.check(made, typed, list_choices(places)))


def walk(config: Config, typed: Sequence[str], changed: Sequence[Change], places: Sequence[Path]) -> int:
    """Online rounds: the exit status. What each round's training is given is checked before anything starts."""
    from halos.logs import speak
    from halos.online import rounds
    from halos.run.outline import Outline

    assert config.online is not None
    speak(main=True)
    words = inner_words(typed, config)
    if config.resume:
        words = [*rounds.stored_words(Path(config.run_dir)), *[word for word in words[1:] if word not in config.online.overrides]]
    training = within(config, words, places)
    status = rounds.run(config, training, words, typed, changed, partial(Outline, training))
    if not config.dry_run and RunDir(config.run_dir).read_metrics():
        show(config)
    return status


def show(config: Config) -> None:
    """Pictures of the rounds."""
    from halos.report.__main__ import main as report_on

    report_on([config.run_dir])


def run(config: Config, typed: Sequence[str], changed: Sequence[Change] = (), places: Sequence[Path] = (ROOT / "config",)) -> int:
    """The exit status of the run itself."""
    if gate.is_walk(config):
        return walk(config, typed, changed, places)
    from halos.run import run as build_and_fit  # here: it imports torch, which --help and wrong input need not wait for

    return build_and_fit(config, list(typed), changed)


if __name__ == "__main__":
    main()
