"""``python -m unialignment``: the command line where ``unialign`` isn't on the path."""

import sys

from unialignment.cli import main

sys.exit(main())
