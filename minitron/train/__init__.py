"""The training loop and what plugs into it."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
