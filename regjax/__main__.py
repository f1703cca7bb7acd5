"""`python -m regjax` is the command `regjax`."""

import sys

from regjax.cli import main

sys.exit(main())
