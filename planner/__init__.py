"""What to keep: rules per KV head, the plan file, its cost. NumPy only; no torch."""
