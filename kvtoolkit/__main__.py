"""``python -m kvtoolkit`` is the command ``kvtoolkit``."""

import sys

from kvtoolkit.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
