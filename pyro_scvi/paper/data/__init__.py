"""The data sets of the tables and figures: real counts, their corruption, and simulated cells."""
