"""Depthwise convolutions by tables of taps: definition, kernels, registration."""
