"""What surrounds the scan, in one pass through memory each."""
