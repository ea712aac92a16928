"""A campaign against the command line, that nothing be lost, fooled or left silent: see ``tools/torture --help``."""
