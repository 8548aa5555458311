"""Compress Llama models by structured pruning and knowledge distillation, Megatron-style."""

__version__ = "0.1.0"
