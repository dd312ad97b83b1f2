"""`python -m hf_argen`, the `argen` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
