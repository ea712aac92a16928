"""Checkpoints and folded models: written aside and committed, read without executing code."""
