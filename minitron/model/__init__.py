"""Llama on megatron-core: its shape, its parallel definition, its weights on disk."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
