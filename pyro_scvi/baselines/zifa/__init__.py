"""ZIFA, zero-inflated factor analysis: the model, its EM algorithm and the estimator."""
