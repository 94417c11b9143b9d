"""Predictions of a fit: predictive checks, calibration, imputation."""
