"""Programs of one's own looked at before a verb computes with them: densities must be the same in every run."""
