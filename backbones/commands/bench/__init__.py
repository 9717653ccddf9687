"""The benchmarks of ``ssm-backbones benchmark``."""
