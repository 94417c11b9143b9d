"""Results in other formats: AnnData for scanpy, DataTree for ArviZ, files by blocks, HTML pages and their figures."""
