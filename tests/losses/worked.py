"""The numbers of halos/losses/worked.yaml from the formulas of the papers, in float64 with NumPy: no code of halos, and no torch.

    python -m tests.losses.worked [LOSS ...]

prints what the examples of a loss should be, those that a new example gives included. A formula takes an example's policy, the
whole example, and the policy again as `held`: what has no gradient is computed from that.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.losses import worked_pairs, worked_tokens
from tests.losses.worked_pairs import clamped

FILE = Path(__file__).resolve().parents[2] / "halos" / "losses" / "worked.yaml"
FORMULAS = {**worked_pairs.FORMULAS, **worked_tokens.FORMULAS}
STEP = 1e-6  # of a central difference
FOUND = ("values", "advantages", "returns", "after", "start")  # results of an example, besides its metrics and gradient
ROUNDED, SLOPE = 3e-8, 1e-6  # relative, of numbers that are written with nine digits, as their inputs are; of differences
NEAR_ZERO = 1e-9  # what counts as 0


def examples() -> dict[str, list[Mapping[str, Any]]]:
    """Of each loss, from the file."""
    nodes = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: node["examples"] for name, node in nodes.items() if "examples" in node}


def numbers(loss: str, example: Mapping[str, Any]) -> dict[str, Any]:
    """All that an example gives of a loss: `values` and the like, `metrics`, and the `gradient` of the sum of the values."""
    policy = next((example[name] for name in ("policy", "scores", "steps") if name in example), None)
    values, named = evaluated(loss, policy, example, policy)
    results = {name: named.pop(name) for name in FOUND if name in named} | ({} if values is None else {"values": values})
    if "gradient" in example:
        results["gradient"] = gradient(loss, policy, widened(loss, example), example["gradient"])
    return {**results, "metrics": named}


def widened(loss: str, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Humanline's bounds wider than a difference: a token at a bound, where the clamp has two slopes, has that of the inside."""
    name = "keys" if loss == "humanline" else "humanline"
    if name not in example or "low" not in example[name]:
        return example
    return {**example, name: {"low": example[name]["low"] - 2 * STEP, "high": example[name]["high"] + 2 * STEP}}


def evaluated(loss: str, policy: Any, example: Mapping[str, Any], held: Any) -> worked_pairs.Result:
    if "humanline" in example:
        policy = clamped(policy, example["reference"], example["humanline"])
    return FORMULAS[loss](policy, example, held)


def gradient(loss: str, policy: Any, example: Mapping[str, Any], wanted: Any, path: tuple[Any, ...] = ()) -> Any:
    """By central differences, in the shape that the example gives it in: parts by name, ragged rows."""
    if isinstance(wanted, Mapping):
        return {name: gradient(loss, policy, example, part, (*path, name)) for name, part in wanted.items()}
    if isinstance(wanted, Sequence):
        return [gradient(loss, policy, example, part, (*path, n)) for n, part in enumerate(wanted)]
    ends = [sum_of(evaluated(loss, moved(policy, path, by), example, policy)[0]) for by in (STEP, -STEP)]
    return (ends[0] - ends[1]) / (2 * STEP)


def moved(policy: Any, path: tuple[Any, ...], by: float) -> Any:
    """The policy with one number changed; of log-probs with further columns, `values` is not named in a path."""
    changed = copy.deepcopy(policy)
    node = changed
    for step in path[:-1]:
        node = node["values"] if isinstance(step, int) and isinstance(node, Mapping) else node
        node = node[step]
    node[path[-1]] += by
    return changed


def sum_of(values: Any) -> float:
    parts = values.values() if isinstance(values, Mapping) else [values]
    return float(sum(np.sum(row) for part in parts for row in part))


def differences(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """Where numbers differ; rows may have zeros beyond the end of what was found."""
    if isinstance(expected, Mapping):
        for key, each in expected.items():
            if key not in found:
                yield f"{name}.{key} is not computed"
                continue
            yield from differences(each, found[key], f"{name}.{key}")
    elif isinstance(expected, Sequence):
        if len(found) > len(expected):
            yield f"{name} has {len(found)} entries, not {len(expected)}"
        for n, each in enumerate(expected):
            beyond = [0.0] * len(each) if isinstance(each, Sequence) else 0.0
            yield from differences(each, found[n] if n < len(found) else beyond, f"{name}[{n}]")
    elif not abs(found - expected) <= ((SLOPE if ".gradient" in name else ROUNDED) * abs(expected) or NEAR_ZERO):
        yield f"{name} is {found:.9g}, and not {expected:.9g}"


def plain(found: Any) -> Any:
    """With nine digits, as the file has them."""
    if isinstance(found, Mapping):
        return {name: plain(each) for name, each in found.items()}
    return [plain(each) for each in found] if isinstance(found, list | np.ndarray) else float(f"{found:.9g}")


def main() -> None:
    known = examples()
    for loss in sys.argv[1:] or list(known):
        for number, example in enumerate(known[loss], 1):
            print(f"# {loss}, example {number}")
            print(yaml.safe_dump(plain(numbers(loss, example)), default_flow_style=None, sort_keys=False, width=120), end="")


if __name__ == "__main__":
    main()
