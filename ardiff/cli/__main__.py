"""`python -m ardiff.cli`, as launchers of several processes want it."""

import sys

from ardiff.cli import main


if __name__ == "__main__":
    sys.exit(main())
