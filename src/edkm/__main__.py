"""`python -m edkm`: the same as the command `edkm`."""

import sys

from .cli import main

sys.exit(main())
