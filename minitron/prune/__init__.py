"""Importance estimation and structured pruning."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
