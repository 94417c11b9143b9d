"""Harness: worker processes, clocks, memory, the cells that both sides get, and the report.

Tasks are measured. A task is a function, named ``module:function``: a worker process calls it to prepare, and calls its
result to measure. The process that starts the workers imports nothing large, because a child's peak of memory may start
at its parent's.
"""
