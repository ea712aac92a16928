"""The command line. Nothing heavy is imported until a command runs."""

from taperlit.cli.entry import main

__all__ = ["main"]
