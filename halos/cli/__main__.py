"""python -m halos.cli: the same command as `halos` and `python train.py`."""

from halos.cli.command import main

if __name__ == "__main__":
    main()
