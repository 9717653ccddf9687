"""RMSNorm: definition, kernel, registration."""
