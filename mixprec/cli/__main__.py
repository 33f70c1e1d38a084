"""`python -m mixprec.cli`, which is `python -m mixprec`."""

import sys

from mixprec.cli import main

if __name__ == "__main__":
    sys.exit(main())
