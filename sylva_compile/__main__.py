"""`python -m sylva_compile`: the command line."""

import sys

from sylva_compile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
