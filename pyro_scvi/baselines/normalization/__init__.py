"""Normalization of sequencing depth: scaling methods, and SCONE, which ranks many normalizations."""
