"""ZINB-WaVE: the model, its initialization and optimization, and the estimator."""
