"""The command line: from overrides to a run, an online run or a sweep. The only package that imports hydra."""
