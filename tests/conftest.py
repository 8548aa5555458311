"""Fixtures that every test sees."""

import pytest
import torch

from tests import harness


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure():
    harness.close_pool()
