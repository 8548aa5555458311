"""Measures of a model's quality."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
