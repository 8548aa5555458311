"""The sections that recipes are made of.

A section is a frozen dataclass that checks itself; the string after a field is its help. They live
here, apart from what they configure, because this package imports nothing that takes time: a launch
script answers `--help` and a mistake on the command line before it imports torch and megatron-core.
"""
