"""`python -m hf_argen.cli`."""

import sys

from .app import main

sys.exit(main())
