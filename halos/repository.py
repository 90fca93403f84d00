"""Paths of config/, launch/ and train.py: next to this package in a clone, inside it when installed."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "_repository" if (_HERE / "_repository").is_dir() else _HERE.parent
CONFIG, LAUNCH, TRAIN = ROOT / "config", ROOT / "launch", ROOT / "train.py"
PACKAGES = _HERE.parent  # the entry of sys.path from which this package is imported
COMMAND = "python train.py" if _HERE.parent == ROOT else "halos"  # the command that starts a run, for messages
