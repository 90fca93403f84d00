"""The checks of the suite, in the order in which they start, with the seconds after which each is killed."""

from collections.abc import Sequence
from dataclasses import dataclass

ONE_LANE = 6  # GiB of a card that a check which shares it may take
LIMITS = {False: 510, True: 165}  # seconds of the whole suite, and with ONLY=quick
SLOWER = 12  # a CPU at toy sizes gets so many times the seconds


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    function: str  # module of this package, and function of (name, Place) in it
    seconds: int  # after which it is killed
    expected: str
    quick: bool = False
    alone: bool = False  # nothing else runs on the card
    memory: int = ONE_LANE  # GiB that the card must have
    half: bool = False  # needs a card with bfloat16
    needs: tuple[str, ...] = ()  # checks that must have passed


def _crash(name: str, *, seconds: int = 75, quick: bool = False, half: bool = False, needs: Sequence[str] = ()) -> Check:
    return Check(f"crash-{name}", "crashes.check", seconds, "finishes, finite", quick, half=half, needs=tuple(needs))


CHECKS = [
    Check("environment", "card.check", 90, "a usable card", quick=True, alone=True),
    Check("model-small", "models.check", 60, "built", quick=True),
    Check("model-wide", "models.check", 60, "built", memory=12),
    Check("model-1.5b", "models.check", 80, "built", memory=24),
    Check("model-8b", "models.check", 110, "built", memory=70),
    _crash("sft-full", quick=True),
    _crash("dpo-lora", quick=True),
    _crash("live-full", quick=True, seconds=100),
    _crash("reward-lora", quick=True),
    _crash("deterministic-mode", quick=True),
    Check("out-of-memory", "crashes.out_of_memory", 75, "exit status 1, one message with the keys that help", quick=True),
    Check("exact-float32", "exact.float32", 100, "gradient within 5e-6 of naive float32, loss within its rounding", quick=True),
    Check("exact-bfloat16", "exact.bfloat16", 100, "gradient at most 1.1 x naive bfloat16's distance from float64", quick=True,
          half=True),
    Check("deterministic", "repeat.deterministic", 110, "two runs equal bit for bit", quick=True, needs=("model-small",)),
    Check("resume", "repeat.resume", 110, "killed and resumed: equal bit for bit", quick=True, needs=("deterministic",)),
    Check("merge", "merged.check", 100, "the proof holds; from_pretrained equals base and adapter", quick=True,
          needs=("model-small",)),
    Check("syncs", "speed.syncs", 75, "at most 1 synchronisation a step", quick=True, needs=("model-small",)),
    _crash("sft-lora-float32"),
    _crash("dpo-full-float32"),
    _crash("dpo-full-bfloat16", half=True),
    _crash("dpo-unshared-prompts"),
    _crash("kto-lora-dropout-checkpointing"),
    _crash("kto-full"),
    _crash("reward-full"),
    _crash("grpo-offline"),
    _crash("ppo-offline"),
    _crash("live-lora", seconds=100),
    _crash("rounds", seconds=150),
    _crash("compiled", seconds=120),
    _crash("async-save"),
    _crash("muon"),
    _crash("flash-attention-2", half=True),
    _crash("ddp"),
    _crash("fsdp2"),
    _crash("wide-sft-full", needs=["model-wide"]),
    _crash("wide-dpo-lora", needs=["model-wide"]),
    Check("kernels", "kernels.check", 75, "right; a new shape costs at most 20 ms more than a known one", quick=True, alone=True),
    Check("varlen", "varlen.check", 75, "right, the same bits twice; one kernel for all sequences beside one for each, measured",
          quick=True, alone=True, half=True),
    Check("speed-small-full", "speed.check", 75, "measured", quick=True, alone=True, needs=("model-small",)),
    Check("speed-1.5b-full", "speed.check", 90, "MFU at least 30 % on an H100 or H200", alone=True, memory=60, half=True,
          needs=("model-1.5b",)),
    Check("speed-1.5b-lora", "speed.check", 80, "measured", alone=True, memory=24, half=True, needs=("model-1.5b",)),
    Check("speed-8b-lora", "speed.check", 120, "MFU at least 35 % on an H100 or H200", alone=True, memory=70, half=True,
          needs=("model-8b",)),
    Check("speed-1.5b-full-cast", "speed.check", 90, "measured", alone=True, memory=60, half=True, needs=("model-1.5b",)),
    Check("speed-1.5b-lora-compiled", "speed.check", 120, "measured", alone=True, memory=24, half=True, needs=("model-1.5b",)),
]  # fmt: skip
BY_NAME = {check.name: check for check in CHECKS}


def chosen(only: str) -> list[Check]:
    """The checks of ONLY: all, `quick`, or names and first parts of names with commas; and what those need. Raises ValueError."""
    if not only:
        return CHECKS
    words, wanted = [word.strip() for word in only.split(",") if word.strip()], {"environment"}
    for word in words:
        found = {each.name for each in CHECKS if each.name == word or each.name.startswith(word + "-")}
        found |= {each.name for each in CHECKS if each.quick and word == "quick"}
        if not found:
            raise ValueError(f"no check {word}; there are quick, {', '.join(BY_NAME)}")
        wanted |= found
    while more := {name for each in wanted for name in BY_NAME[each].needs} - wanted:
        wanted |= more
    return [check for check in CHECKS if check.name in wanted]
