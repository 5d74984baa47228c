"""One job of a sweep: the command line `ssl-lab ...` in a process that does not outlive the sweep."""

import sys

from ssl_lab.cli.main import main
from ssl_lab.train.signals import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
