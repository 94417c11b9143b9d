"""Counts and annotations of cells: from AnnData or a store on disk to minibatches on the device."""
