"""``python -m rootward`` is the command line."""

import sys

from rootward.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
