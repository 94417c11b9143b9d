"""What the default model was chosen by, and how it stands beside its peer."""
