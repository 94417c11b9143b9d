"""Harness: worker processes, clocks, memory, the cells that both sides get, and the report.

What is measured are tasks: functions, named as ``module:function``, that a worker process calls to prepare, and whose
result it calls to measure. The process that starts the workers imports nothing large, since a child's peak of memory
may start at what its parent holds.
"""
