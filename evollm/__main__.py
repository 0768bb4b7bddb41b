"""`python -m evollm`, which is also how torchrun and `accelerate launch` start commands: `torchrun -m evollm train`."""

from __future__ import annotations

import sys

from evollm.cli import main

if __name__ == "__main__":
    sys.exit(main())
