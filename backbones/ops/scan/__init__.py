"""The selective scan: definition, kernels, registration."""
