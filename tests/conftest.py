"""Fixtures that every test sees."""

import collections
import gc

import pytest
import torch

from tests import harness


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # modules stay: a collection otherwise takes 0.3 s to find that


def pytest_terminal_summary(terminalreporter):
    """What was skipped, in a line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2] for report in skipped)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} {reason.replace('Skipped: ', 'skipped: ')}")


def pytest_unconfigure():
    harness.close_pool()
