"""`python -m esper_fn.cli`."""

import sys

from esper_fn.cli import main

if __name__ == "__main__":
    sys.exit(main())
