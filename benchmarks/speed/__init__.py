"""What it costs: seconds, rows, memory, imports and clients, as ratios in one run."""
