"""Every launch file is one that accelerate, or Slurm's shell, can read."""

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
CONFIGS = sorted((LAUNCH / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config_and_requests_what_its_name_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config_file", str(path), "train.py", "loss=sft"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ""
    zero = re.search(r"zero(\d)", path.stem)
    environment = prepare_deepspeed_cmd_env(arguments)[1] if zero else prepare_multi_gpu_env(arguments)
    assert arguments.use_deepspeed == bool(zero)
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == (zero[1] if zero else None)
    assert arguments.use_fsdp == ("fsdp2" in path.stem)
    assert environment.get("FSDP_VERSION") == ("2" if "fsdp2" in path.stem else None)
    assert (arguments.num_machines > 1) == ("multinode" in path.stem)
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if path.stem.startswith("cpu") else "bf16")
    assert environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    assert (arguments.num_processes > 1) == (path.stem not in ("cpu1", "gpu1"))
    assert not {line.split(":")[0].strip() for line in path.read_text().splitlines()} & {
        "fsdp_transformer_layer_cls_to_wrap", "fsdp_auto_wrap_policy",
    }, "layers are found, not named"  # fmt: skip


@pytest.mark.parametrize("path", sorted((LAUNCH / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_a_batch_script_is_valid_shell_and_makes_slurm_signal_the_ranks_and_requeue_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", path.read_text(), re.M))
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "requeue", "signal", "open-mode"} <= asked.keys()
    assert asked["open-mode"] == "append"
    assert re.fullmatch(r"USR1@\d+", asked["signal"]), "with B: only the script would hear it"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"], "a task is a rank"
    assert (int(asked["nodes"]) > 1) == (path.stem == "multi_node")
