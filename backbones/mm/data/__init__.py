"""Data sets, and their check before a run."""
