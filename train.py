"""python train.py loss=dpo model=tiny data=arithmetic exp_name=demo; what can be typed: python train.py --help."""

from halos.cli.command import main, start

__all__ = ["main", "start"]

if __name__ == "__main__":
    main()
