"""Integration: embeddings of cells across batches."""
