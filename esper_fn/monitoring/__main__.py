"""`python -m esper_fn.monitoring DIR`."""

import sys
from pathlib import Path

from esper_fn.monitoring import write

if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "monitoring")):
        sys.stdout.write(f"{path}\n")
