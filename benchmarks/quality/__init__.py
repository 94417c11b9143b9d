"""Statistical quality: held-out evidence, calibration, posterior draws, differential expression, baselines."""
