"""Examples that are too long, without their oldest turns."""

from dataclasses import replace

from halos.data.messages import SYSTEM, is_learned, moved_settings
from halos.examples import Example, Turns


def shortened(example: Example) -> list[Example]:
    """Return the example without its oldest turns, ever shorter: system turns stay, and the first other turn is the user's.

    The shortest keeps the last user turn and what follows it. Where all assistant turns of a conversation are scored, the
    oldest of those are removed too.
    """
    return [_starting_at(example, n) for n in starts(example)]


def starts(example: Example) -> list[int]:
    """Return the turns of the user's with which a shorter example may start."""
    (first, *others), turns = example.completions, example.prompt
    turns += () if others else first
    others = [n for n, turn in enumerate(turns) if turn["role"] not in SYSTEM]
    return [n for n in others[1:] if turns[n]["role"] == "user"]


def _starting_at(example: Example, start: int) -> Example:
    prompt = example.prompt
    if start < len(prompt):
        return replace(example, prompt=moved_settings(_system_turns(prompt[:start]) + prompt[start:], prompt[0]))
    ((name, completion),) = zip(example.completed, example.completions, strict=True)
    turns = prompt + completion
    answer = next(n for n in range(start, len(turns)) if is_learned(turns[n]))
    kept = moved_settings(_system_turns(turns[:start]) + turns[start:answer], prompt[0])
    return replace(example, prompt=kept, **{name: turns[answer:]})


def _system_turns(turns: Turns) -> Turns:
    return tuple(turn for turn in turns if turn["role"] in SYSTEM)
