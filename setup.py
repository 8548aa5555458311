"""Build hook of minitron; everything declarative lives in pyproject.toml.

The C++/CUDA extension of csrc/ is added here when it exists; until then the package is pure Python.
"""

from setuptools import setup

setup()
