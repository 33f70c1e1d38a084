"""`python -m mixprec`, for environments whose scripts are not on PATH."""

import sys

from mixprec.cli import main

if __name__ == "__main__":
    sys.exit(main())
