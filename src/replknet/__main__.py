"""`python -m replknet`."""

import sys

from replknet.cli import main

sys.exit(main())
