"""`python -m opsd`: the same as the `opsd` command."""

import sys

from opsd.cli.main import main

sys.exit(main())
