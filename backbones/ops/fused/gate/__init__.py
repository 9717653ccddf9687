"""The gate that follows the scan: definition, kernel, registration."""
