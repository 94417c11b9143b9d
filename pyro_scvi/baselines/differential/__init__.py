"""Differential expression between two groups of cells by other methods: the Wilcoxon test, MAST and DESeq2."""
