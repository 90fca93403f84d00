"""Prove a loss: python -m halos.losses.certify LOSS [KEY=VALUE ...] [--plugins PACKAGE ...]."""

import sys

from halos.certify.command import main
from halos.errors import command

if __name__ == "__main__":
    sys.exit(command(main))
