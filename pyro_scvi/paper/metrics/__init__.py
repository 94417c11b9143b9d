"""Scores of the tables and figures: agreement with microarrays, quality of embeddings, and zeros."""
