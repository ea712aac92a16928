"""One experiment a file: its table, its CSV rows, its figure, and what it says to the paper's claims."""
