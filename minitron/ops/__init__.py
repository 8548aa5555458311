"""Fused operations, one file each: the PyTorch reference and its gradient."""
