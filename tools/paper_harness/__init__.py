"""The paper's figures and tables, each from one command: see ``tools/paper --help``."""
