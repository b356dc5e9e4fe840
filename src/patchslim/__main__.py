"""`python -m patchslim`: the command line."""

import sys

from patchslim.cli.main import main

# Reports quote the command that made them, by its name.
sys.argv[0] = "patchslim"
sys.exit(main())
