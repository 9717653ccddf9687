"""What a scan's states are turned into: their product with C, and D times the input."""
