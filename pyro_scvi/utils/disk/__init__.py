"""Files that are written whole or not at all, and read with care: locks, publishing, temporary folders, HDF5."""
