"""``python -m graft``: the command ``graft``."""

from .cli import main

main()
