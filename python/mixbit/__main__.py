"""`python -m mixbit`."""

import sys

from mixbit.cli import main

sys.exit(main())
