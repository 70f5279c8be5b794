"""``python -m transfer_surgery``: the command where it is not installed."""

from transfer_surgery.cli import main

main()
