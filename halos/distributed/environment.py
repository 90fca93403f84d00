"""What a launcher told this process of itself, read from the environment. Imports no torch: wrong input is refused before."""

import os

from halos.errors import UserError, one_line

MEETING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # all of them, or nobody launched this process
MINE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def number_of(name: str, default: int) -> int:
    """A variable that counts processes; the default for an empty one and for what `refuse_half_launched` refuses."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else default


def world_size() -> int:
    return max(1, number_of("WORLD_SIZE", 1))


def refuse_half_launched() -> None:
    """Raises UserError for what a scheduler, or an earlier shell, left in the environment: this process would wait for others
    that nobody starts, or be one of several that never meet."""
    there = [name for name in MINE if os.environ.get(name)]
    for name in there:
        if number_of(name, -1) < 0:
            raise UserError(f"the environment has {name}={one_line(os.environ[name])}, which is no number: unset it")
    missing = [name for name in MEETING if not os.environ.get(name)]
    if not there or not missing or (there == ["WORLD_SIZE"] and world_size() == 1):
        return
    told = " ".join(f"{name}={os.environ[name]}" for name in there)
    raise UserError(
        f"the environment has {told}, as if a launcher had started this process, but not {', '.join(missing)}: start it with"
        f" accelerate launch or torchrun; or, where a scheduler has left them behind, unset {' '.join(there)}"
    )
