"""All checks of one loss, and what it declares not to hold."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halos.certify import cost, directions, invariances, modifier
from halos.certify.case import synthetic_case
from halos.certify.modifier import MODIFIER
from halos.certify.mutants import mutants, survivors
from halos.certify.own import OwnLoss
from halos.certify.subjects import Named
from halos.certify.verdict import Check, Finding, failed, judged, not_applicable, passed
from halos.certify.worked import Worked, function_of, problem, settings_of
from halos.config.mixture_parts import is_mixture
from halos.errors import UserError, first_line_of
from halos.trainers import humanline

CONTRACT, NUMBERS, MUTANTS, EXEMPT = "contract", "worked numbers", "mutants", "exemptions"
CHECKS: Mapping[str, Callable[[Any], Finding]] = {
    "policy = reference": invariances.value_at_reference, "gradient signs": directions.signs, "swap": directions.swap,
    "long completions": directions.long_completions,
    "padding": invariances.padding, "micro-batches": invariances.microbatches, "accumulation": invariances.accumulation,
    "ranks": invariances.ranks, "order of rows": invariances.order, "float32": invariances.float_types,
    "large log-probs": invariances.large_numbers, "one row": invariances.few_rows, "an empty class": invariances.absent_class,
    "NaN and Inf": invariances.bad_numbers, "cost": cost.cost,
}  # fmt: skip
SHOWN = 3  # mutants in a line
_KNOWN: dict[tuple[str, ...], tuple[int, list[tuple[int, str]]]] = {}
NO_EXAMPLES = "it has none: EXAMPLES beside the function, or --examples FILE (halos/losses/README.md, Prove a loss)"


@dataclass(frozen=True)
class Certificate:
    """The checks of a loss; `alive` are the mutants that its worked numbers do not tell from it."""

    loss: Named
    checks: Sequence[Check]
    alive: Sequence[str]

    @property
    def passes(self) -> bool:
        return all(check.verdict != "FAIL" for check in self.checks)


def certify(loss: Named) -> Certificate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mutants divide by zero
        checks = list(_checks(loss))
        proved = bool(loss.worked.examples) and checks[-1].verdict == "pass"
        count, alive = _mutants(loss) if proved else (0, [])
        checks += [Check.of(MUTANTS, _of_mutants(loss.worked, count, alive))] if proved else []
        if loss.humanline is not None:
            checks.append(clamp := _guarded(f"{MODIFIER} numbers", lambda: _numbers_of_modifier(loss)))
            count, alive_of_clamp = modifier.surviving(loss.modifier.examples) if clamp.verdict == "pass" else (0, [])
            checks.append(Check.of(f"{MODIFIER} {MUTANTS}", _of_mutants(loss.modifier, count, alive_of_clamp)))
            alive = [*alive, *alive_of_clamp]
    return Certificate(loss, _exempted(loss, checks, alive), [text for _, text in alive])


def _checks(loss: Named) -> Iterator[Check]:
    subject = OwnLoss(loss.spec, loss.humanline)
    contract = _guarded(CONTRACT, lambda: _contract(subject))
    yield contract
    if contract.verdict == "FAIL":
        return
    for name, check in CHECKS.items():
        yield _guarded(name, lambda check=check: check(subject))
    yield _guarded(NUMBERS, lambda: _numbers(loss))


def _contract(subject: OwnLoss) -> Finding:
    """The trainer's own checks of what a loss returns: shapes, denominators, metrics, and a gradient."""
    case = synthetic_case(subject)
    step = subject.step(case, case.whole)
    names = sorted(step.names[0])
    return passed(f"{len(names)} metrics: {', '.join(names)}")


def _guarded(name: str, check: Callable[[], Finding]) -> Check:
    """A check, failed where the loss raises."""
    try:
        return Check.of(name, check())
    except UserError as error:
        return Check(name, "FAIL", str(error))
    except Exception as error:  # whatever a user's loss raises
        return Check(name, "FAIL", f"it raises {type(error).__name__}: {first_line_of(error)}")


# --- worked numbers ----------------------------------------------------------------------------------------------------


def _numbers(loss: Named) -> Finding:
    examples = loss.worked.examples
    if is_mixture({"_target_": loss.target}) and not examples:
        return not_applicable(f"its parts have their own: {', '.join(loss.spec.settings['parts'])}")
    if not examples:
        return failed(NO_EXAMPLES)
    namespace = vars(sys.modules[function_of(loss.spec).__module__])
    for number, example in enumerate(examples, 1):
        if (wrong := problem(loss.spec, namespace, example)) is not None:
            return failed(f"example {number} of {len(examples)}: {wrong}")
    sizes = {size for example in examples for size in Counter(example.get("sampled", {}).get("groups", ())).values()}
    if len(sizes) == 1:
        return failed(
            f"every group in its examples has {sizes.pop()}: give groups of two sizes, or what divides by it is not seen"
        )
    return passed(f"{len(examples)} example{'s' if len(examples) > 1 else ''}, computed in float64")


def _mutants(loss: Named) -> tuple[int, list[tuple[int, str]]]:
    """How many there are, and line and text of those that no worked number tells from the loss.

    Found once for a function that several choices of config/loss have, where the examples say all that these differ in.
    """
    function = function_of(loss.spec)
    given = [sorted(settings_of(loss.spec, example).items()) for example in loss.worked.examples]
    known = function.__module__, repr(given), repr(loss.worked.examples)
    if known in _KNOWN:
        return _KNOWN[known]
    every = list(mutants(sys.modules[function.__module__], function.__name__))
    alive = survivors(every, lambda namespace, example: problem(loss.spec, namespace, example), loss.worked.examples)
    return _KNOWN.setdefault(known, (len(every), alive))


def _numbers_of_modifier(loss: Named) -> Finding:
    for number, example in enumerate(examples := loss.modifier.examples, 1):
        if (wrong := modifier.problem(vars(humanline), example)) is not None:
            return failed(f"example {number} of {len(examples)}: {wrong}")
    under = sum(MODIFIER in example for example in loss.worked.examples)
    of_both = f"; {under} of {loss.name}'s own numbers are under it" if under else ""
    return passed(f"{len(examples)} examples, computed in float64{of_both}")


def _of_mutants(numbers: Worked, count: int, alive: Sequence[tuple[int, str]]) -> Finding:
    if not count:
        return not_applicable("its function has nothing to change: it calls another")
    open_ = [(line, text) for line, text in alive if text not in numbers.exempt]
    some = "; ".join(f"line {line}: {text}" for line, text in open_[:SHOWN]) + ("; ..." if len(open_) > SHOWN else "")
    exempt = f", but for {len(alive) - len(open_)} that are declared to be equivalent" if len(alive) > len(open_) else ""
    good = f"the worked numbers tell all {count} mutants from it{exempt}"
    return judged(f"{len(open_)} of {count} give the worked numbers too: {some}" if open_ else None, good)


def _exempted(loss: Named, checks: Sequence[Check], alive: Sequence[tuple[int, str]]) -> list[Check]:
    """The checks, of which a failed one that is declared with a reason counts as exempt. One that is declared in vain fails."""
    exempt, failing = {**loss.worked.exempt, **loss.modifier.exempt}, {check.name for check in checks if check.verdict == "FAIL"}
    counted = failing & exempt.keys()
    out = [Check(each.name, "exempt", f"{exempt[each.name]} ({each.evidence})") if each.name in counted else each
           for each in checks]  # fmt: skip
    vain = [name for name in exempt if name not in failing and name not in {text for _, text in alive}]
    return [*out, Check(EXEMPT, "FAIL", f"declared, but nothing fails: {'; '.join(vain)}")] if vain else out
