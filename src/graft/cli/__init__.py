"""The command ``graft``. One file a verb; only this package imports click and rich."""

from __future__ import annotations

import sys
from importlib.util import find_spec

EXIT_DIFFERS, EXIT_USER = 1, 2


def main() -> None:
    """Entry point of the ``graft`` command; needs the ``cli`` extra."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        print(
            f"error: the graft command needs {' and '.join(missing)}, not installed here.\n"
            "Install it with: pip install 'graft-lora[cli]'",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER)
    from .app import cli

    cli.main(prog_name="graft")
