"""The tables and figures of Lopez et al. (2017), made again on real counts.

``python -m pyro_scvi paper all --out DIR`` makes them all. An experiment has steps and rows. A step is a function with
its settings, and its result is cached by the hash of both. The rows are made from these results.
"""
