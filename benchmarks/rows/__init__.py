"""Rows of the tables of speed and memory: a module for each row or family of rows."""
