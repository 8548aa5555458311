"""Knowledge distillation from a frozen teacher."""

from minitron import platform as _platform  # noqa: F401  before megatron.core
