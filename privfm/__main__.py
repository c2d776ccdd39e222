"""`python -m privfm`: the same as `privfm`."""

import sys

from privfm.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
