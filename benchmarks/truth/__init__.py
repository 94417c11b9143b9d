"""Checks of inference against references that share no code with it: quadrature, exact arithmetic, known latents."""
