"""Runs as one self-contained HTML page: what they were, how they went, and what became of their norms."""
