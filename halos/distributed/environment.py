"""The environment: the rank variables that a launcher sets, and those of deterministic kernels. Imports no torch, so that wrong
input is refused at once."""

import os

from halos.errors import UserError, one_line

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
RENDEZVOUS_VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")  # a launcher sets all of them
DETERMINISTIC = {  # read by cuBLAS and by flash-attn, before their first call
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}


def count_from_environment(name: str, default: int) -> int:
    """The value of a variable that counts ranks; the default if it is empty or `refuse_partial_launch` would refuse it."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else default


def world_size() -> int:
    return max(1, count_from_environment("WORLD_SIZE", 1))


def refuse_partial_launch() -> None:
    """Raises UserError for rank variables left behind by a scheduler or an earlier shell: this process would wait for ranks
    that nobody starts, or be one of several that never form a group."""
    present = [name for name in RANK_VARIABLES if os.environ.get(name)]
    for name in present:
        if count_from_environment(name, -1) < 0:
            raise UserError(f"the environment has {name}={one_line(os.environ[name])}, which is no number: unset it")
    missing = [name for name in RENDEZVOUS_VARIABLES if not os.environ.get(name)]
    if not present or not missing or (present == ["WORLD_SIZE"] and world_size() == 1):
        return
    settings = " ".join(f"{name}={os.environ[name]}" for name in present)
    raise UserError(
        f"the environment has {settings}, as if a launcher had started this process, but not {', '.join(missing)}: start it with"
        f" accelerate launch or torchrun; or, where a scheduler has left them behind, unset {' '.join(present)}"
    )
