"""Where config/, launch/ and train.py lie: beside this package in a clone, within it where it was installed."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "_repository" if (_HERE / "_repository").is_dir() else _HERE.parent
CONFIG, LAUNCH, TRAIN = ROOT / "config", ROOT / "launch", ROOT / "train.py"
PACKAGES = _HERE.parent  # what sys.path needs, for a process to import this package
COMMAND = "python train.py" if _HERE.parent == ROOT else "halos"  # what starts a run, for people
