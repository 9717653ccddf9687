"""The operators around the scan, each in one pass through memory."""
