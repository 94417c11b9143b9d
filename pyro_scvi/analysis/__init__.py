"""Analyses of a fit: posterior draws, evidence, differential expression, predictive checks, embeddings."""
