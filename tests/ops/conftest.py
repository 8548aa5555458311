"""Devices that an op runs on, and random numbers that can be had again."""

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """Of a test's inputs, another every time; a failure says what it is repeated with."""
    number = int(os.environ.get("SEED", torch.seed() % 2**31))
    torch.manual_seed(number)
    print(f"to repeat: SEED={number}")
    return number
