"""``python -m taperlit``."""

import sys

from taperlit.cli import main

if __name__ == "__main__":
    sys.exit(main())
