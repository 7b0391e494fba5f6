"""`python -m nanoclawd.gateway`."""

import sys

from nanoclawd.gateway.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
