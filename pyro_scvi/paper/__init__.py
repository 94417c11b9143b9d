"""The tables and figures of Lopez et al. (2017), made again on real counts.

``python -m pyro_scvi paper all --out DIR`` makes them all. An experiment is a list of steps, each a function with its
settings whose result is kept by the hash of both, and of rows that are made of those results.
"""
