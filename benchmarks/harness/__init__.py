"""What measures: worker processes, stopwatches, interleaved rounds, simulated and real counts, and the report."""
