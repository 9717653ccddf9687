"""LayerNorm: definition, kernel."""
