"""python -m halos.cli: what `halos` and `python train.py` are."""

from halos.cli.command import main

if __name__ == "__main__":
    main()
