"""``python -m taperlit``."""

import sys

from taperlit.cli import main

sys.exit(main())
