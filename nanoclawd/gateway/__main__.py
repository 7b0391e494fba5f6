"""`python -m nanoclawd.gateway`."""

from nanoclawd.gateway.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
