"""`python -m pytest_chvm.cli`, where the console script is not on PATH."""

import sys

from pytest_chvm.cli import main

sys.exit(main())
