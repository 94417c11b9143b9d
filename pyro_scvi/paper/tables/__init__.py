"""The tables of the paper, one module each, and the seconds and memory of every method."""
