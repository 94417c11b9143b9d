"""Speed, memory and time to quality beside scvi-tools: the rows behind ``python -m benchmarks cpu`` and ``gpu``.

The parent process (:mod:`~benchmarks.speed.harness`, :mod:`~benchmarks.speed.rows`, :mod:`~benchmarks.speed.report`)
imports nothing large. What is measured are tasks: functions, named as ``module:function``, that a worker process calls
to prepare, and whose result it calls to measure.
"""
