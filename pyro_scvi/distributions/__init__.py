"""Count distributions that are stable in float32: negative binomial and zero inflation."""
