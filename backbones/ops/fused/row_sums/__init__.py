"""Weighted sums of rows, added to other rows."""
