"""train.py, of which one rank is told, or finds, something else: python differing.py RANK 'WORD=>OTHER' OVERRIDE ...

`cd=>DIRECTORY` starts it there.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train

rank, change, *words = sys.argv[1:]
old, _, new = change.rpartition("=>")
if old == "cd" and os.environ["RANK"] == rank:
    os.chdir(new)
mine = [new if word == old else word for word in words] if os.environ["RANK"] == rank else words
sys.argv = ["train.py", *mine]
train.main()
