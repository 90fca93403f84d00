"""Records of HALOs: what its label.py and sample.py write, and its rewards of sampled tokens."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from halos.data.messages import turns_of
from halos.data.numbers import number_in
from halos.data.parts import label_of, number_of, prompt_and_completion
from halos.errors import UserError
from halos.examples import Comparison, Demonstration, Example, Judgement, SampledTokens, Scored, Turns, says_something

CUT = "length"  # `finish` of a sample that was cut at max_new_tokens


def _pairwise(columns: Mapping[str, Any], where: str) -> Comparison:
    """Parse a pair: label 1 prefers output_A, as HALOs itself reads it; the difference of the rewards is the margin."""
    _require(columns, ("prompt", "output_A", "output_B", "label"), where)
    first = label_of(columns, (0, 1), where)
    rewards = number_of(columns, "reward_A", where), number_of(columns, "reward_B", where)
    margin = None
    if rewards[0] is not None and rewards[1] is not None:
        margin = rewards[0] - rewards[1] if first else rewards[1] - rewards[0]
    names = ("output_A", "output_B") if first else ("output_B", "output_A")
    (prompt, chosen), (_, rejected) = (prompt_and_completion(columns, name, where) for name in names)
    return Comparison(prompt, chosen, rejected, margin, sampled=_sampled_tokens(columns, names, where))


def _binary(columns: Mapping[str, Any], where: str) -> Judgement:
    _require(columns, ("prompt", "output", "label"), where)
    prompt, completion = prompt_and_completion(columns, "output", where)
    return Judgement(prompt, completion, label_of(columns, (0, 1, -1), where),
                     sampled=_sampled_tokens(columns, ("output",), where))  # fmt: skip


def _scalar(columns: Mapping[str, Any], where: str) -> Scored:
    _require(columns, ("prompt", "output", "reward"), where)
    return with_reward(columns, *_sampled(columns, where), where)


def _sampled(columns: Mapping[str, Any], where: str) -> tuple[Turns, Turns]:
    """Return a prompt and the completion sampled for it, which may be empty: a model may end at once."""
    prompt = turns_of(columns["prompt"], "user", "prompt", where)
    return prompt, turns_of(columns["output"], "assistant", "output", where)


def _sampled_tokens(columns: Mapping[str, Any], outputs: Sequence[str], where: str) -> tuple[SampledTokens, ...]:
    """Return the tokens of completions in the columns `outputs`; empty where the row says nothing of any."""
    tokens = tuple(_tokens(columns, where, of=name.removeprefix("output")) for name in outputs)
    return tokens if any(each != SampledTokens() for each in tokens) else ()


def _tokens(columns: Mapping[str, Any], where: str, *, of: str = "") -> SampledTokens:
    """Parse a completion's tokens, from columns whose names end in `of`. Raises UserError where they are no token ids."""
    ids = columns.get(f"output_ids{of}")
    if ids is not None and not (isinstance(ids, Sequence) and all(type(each) is int and 0 <= each < 2**31 for each in ids)):
        raise UserError(f"{where}: output_ids{of} is {str(ids)[:60]}, not a list of token ids")
    return SampledTokens(tuple(ids or ()), columns.get(f"vocabulary{of}"), columns.get(f"finish{of}") == CUT)


def _sample(columns: Mapping[str, Any], where: str) -> Demonstration:
    _require(columns, ("output",), where)
    sampled = _sampled_tokens(columns, ("output",), where)
    return Demonstration(*prompt_and_completion(columns, "output", where), sampled=sampled)


def _require(columns: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    if missing := [name for name in names if name not in columns]:
        raise UserError(f"{where}: a {columns['type']} record has {', '.join(names)}; this one lacks {', '.join(missing)}")


def with_reward(columns: Mapping[str, Any], prompt: Turns, completion: Turns, where: str) -> Scored:
    """Return a completion with its reward, and its sampled tokens where the row has them (output_ids, logps, vocabulary)."""
    reward = number_of(columns, "reward", where)
    assert reward is not None, "the column is there"
    tokens, logps = _tokens(columns, where), columns.get("logps") or ()
    refuse_other_logps(tokens.ids, logps, where)
    if (masked := columns.get("masked", False)) not in (0, 1):
        raise UserError(f"{where}: masked is {masked!r}; it takes true or false: whether nothing is learned from the completion")
    if not tokens.ids and not says_something(completion):
        raise UserError(f"{where}: output is empty, and there are no output_ids to tell what was sampled")
    return Scored(prompt, completion, reward, tokens.ids, tuple(map(float, logps)), tokens.vocabulary, cut=tokens.cut,
                  masked=bool(masked), temperature=_temperature(columns, where) if logps else None)  # fmt: skip


def refuse_other_logps(ids: Sequence[Any], logps: Any, where: str) -> None:
    """Raises UserError for log-probs that are not one number for each of the sampled tokens."""
    if not isinstance(logps, Sequence) or not all(isinstance(each, Real) and number_in(each) is not None for each in logps):
        raise UserError(f"{where}: logps is {str(logps)[:60]}, not a list of finite numbers")
    if logps and len(logps) != len(ids):
        raise UserError(f"{where}: logps has {len(logps)} numbers for {len(ids)} output_ids")


def _temperature(columns: Mapping[str, Any], where: str) -> float | None:
    """Return the temperature that log-probs are of; None where the row does not say it."""
    if (value := columns.get("temperature")) is None:
        return None
    if (temperature := number_in(value)) is None or temperature < 0:
        raise UserError(
            f"{where}: temperature is {value!r}; beside logps it takes the number they were sampled at, 0 for greedily"
        )
    return temperature


RECORDS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "pairwise_feedback": _pairwise,
    "binary_feedback": _binary,
    "scalar_feedback": _scalar,
    "sample": _sample,
}
