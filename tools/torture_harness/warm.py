"""All that the commands import, once: what the processes of :mod:`torture_harness.runner` are forked from."""

import os

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import taperlit.checkpoint.folded
import taperlit.cli.bench
import taperlit.cli.export
import taperlit.cli.fold
import taperlit.cli.generate
import taperlit.cli.prompts
import taperlit.cli.report
import taperlit.cli.stress
import taperlit.cli.train
import taperlit.decode.engine
import taperlit.folding
import taperlit.stress.probe  # noqa: F401
import torture_harness.results  # noqa: F401
