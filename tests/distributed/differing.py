"""train.py with another override, or another working directory, on one rank: differing.py RANK 'OVERRIDE=>OTHER' OVERRIDE ...

`cd=>DIRECTORY` starts it there.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train

rank, change, *overrides = sys.argv[1:]
old, _, new = change.rpartition("=>")
if old == "cd" and os.environ["RANK"] == rank:
    os.chdir(new)
mine = [new if each == old else each for each in overrides] if os.environ["RANK"] == rank else overrides
sys.argv = ["train.py", *mine]
train.main()
