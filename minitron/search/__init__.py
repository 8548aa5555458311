"""Architecture search: which of many smaller shapes is worth the full distillation."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
