"""`python -m fusedloss` is the command `fusedloss`."""

import sys

from fusedloss.cli import main

sys.exit(main())
