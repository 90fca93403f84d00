"""What hot_path.py says about its measurements."""

import statistics
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]
Results = dict[str, dict[str, list[Result]]]  # by workload and implementation, one of each turn

NAMES = {"halos": "halos", "stock": "TRL", "fused": "TRL fused"}
LARGEST_DIFFERENCE = 0.03  # in the numbers of useful tokens: TRL also counts what a template adds after the end of a turn
HEAD = "| workload | | useful tokens / CPU-s | ratio | share of the floor | MiB above the model | ratio | first step, s (CPU-s) |"


def derived(raw: Result, tokens: int, flops: float, *, counts_before: bool) -> Result:
    """The numbers of one run over rows of so many useful tokens, which need `flops`. `counts_before`: what is computed before the
    first step belongs to all steps."""
    steps, every = raw["steps"][1:], sum(step["tokens"] for step in raw["steps"])
    done, seconds = sum(step["tokens"] for step in steps), sum(step["cpu_s"] for step in steps)
    if counts_before:
        seconds += raw["prepared_cpu_s"] * done / every
    floor = flops / tokens / raw["gemm_flops_per_s"]  # seconds a token
    return {
        "tokens_per_cpu_s": done / seconds, "share_of_floor": floor * done / seconds, "useful_tokens": every,
        "expected_tokens": tokens, **raw,
    }  # fmt: skip


def line(result: Result) -> str:
    return (
        f"{result['tokens_per_cpu_s']:.1f} useful tokens/CPU-s, {result['share_of_floor']:.0%} of the floor,"
        f" {result['peak_above_model_mib']:.0f} MiB above the model, first step after {result['first_step_after_s']:.1f} s"
    )


def markdown(results: Results) -> str:
    lines, warnings = [HEAD, "| --- | --- | --- | --- | --- | --- | --- | --- |"], []
    for name, by in results.items():
        lines += [row(name, who, turns, by["halos"]) for who, turns in by.items()]
        for who, turns in by.items():
            expected, got = turns[0]["expected_tokens"], turns[0]["useful_tokens"]
            if abs(got - expected) > LARGEST_DIFFERENCE * expected:
                warnings.append(f"warning: {NAMES[who]} trained on {got} tokens in {name}, where the rows have {expected}")
    return "\n".join([*lines, "", "A ratio is halos / TRL.", *warnings])


def row(name: str, who: str, turns: Sequence[Result], mine: Sequence[Result]) -> str:
    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in turns)

    def ratio(key: str) -> str:
        """Of each turn, so that a drift of the machine's speed cancels."""
        if turns is mine:
            return ""
        return f"{statistics.median(a[key] / b[key] for a, b in zip(mine, turns, strict=True)):.2f}"

    return (
        f"| {name} | {NAMES[who]} | {median('tokens_per_cpu_s'):.1f} | {ratio('tokens_per_cpu_s')} |"
        f" {median('share_of_floor'):.0%} | {median('peak_above_model_mib'):.0f} | {ratio('peak_above_model_mib')} |"
        f" {median('first_step_after_s'):.1f} ({median('first_step_after_cpu_s'):.1f}) |"
    )
