"""What a run that is resumed is held against: its own cells and options, and the epochs in its history."""
