"""`python -m waveflow` is the command `waveflow`."""

import sys

from waveflow.cli.main import main

# Guarded: worker processes of `prepare` import this module again.
if __name__ == "__main__":
    sys.exit(main())
