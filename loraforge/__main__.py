"""`python -m loraforge` is the `loraforge` command."""

from __future__ import annotations

from loraforge.cli.app import main

if __name__ == "__main__":
    main()
