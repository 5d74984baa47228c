"""`python -m ssl_lab` is `ssl-lab`."""

import sys

from ssl_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
