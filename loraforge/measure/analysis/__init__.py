"""What the measurements say: statistics with chance levels, runs side by side, suggestions. Torch-free."""
