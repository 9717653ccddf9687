"""State-space duality: Mamba-2's recurrence with one decay for each head, and its sum over all tokens."""
