import pytest
import torch

from minitron.errors import MinitronError
from minitron.prune.depth import kept_layers, layers_to_drop


def test_least_influential_layers_go_counted_from_one():
    influence = torch.tensor([0.9, 0.1, 0.5, 0.05, 0.7])
    assert layers_to_drop(influence, 5) == ()
    assert layers_to_drop(influence, 4) == (4,)
    assert layers_to_drop(influence, 3) == (2, 4)
    assert layers_to_drop(influence, 1) == (2, 3, 4, 5)


def test_of_equal_layers_the_later_goes():
    assert layers_to_drop(torch.tensor([0.5, 0.2, 0.2, 0.2]), 2) == (3, 4)


@pytest.mark.parametrize("num_layers", [0, 6])
def test_impossible_number_of_layers(num_layers):
    with pytest.raises(MinitronError, match=f"cannot keep {num_layers} of 5 layers; keep 1 to 5"):
        layers_to_drop(torch.rand(5), num_layers)


def test_published_depth_model_keeps_the_first_fifteen_and_the_last():
    assert kept_layers(32, range(16, 32)) == (*range(15), 31)


def test_kept_layers_map_new_to_old():
    assert kept_layers(4, ()) == (0, 1, 2, 3)
    assert kept_layers(4, [3, 1]) == (1, 3)
    influence = torch.tensor([0.9, 0.1, 0.5, 0.05, 0.7])
    assert kept_layers(5, layers_to_drop(influence, 3)) == (0, 2, 4)


@pytest.mark.parametrize(
    ("drop_layers", "message"),
    [
        ([0], "drop_layers names layer 0; the model has layers 1 to 4, counted from 1"),
        ([1, 5], "drop_layers names layer 5; the model has layers 1 to 4"),
        ([-1], "drop_layers names layer -1"),
        ([2, 3, 2], "drop_layers names layer 2 twice"),
        ([1, 2, 3, 4], "drop_layers names all 4 layers; keep at least one"),
    ],
)
def test_layers_that_cannot_be_dropped(drop_layers, message):
    with pytest.raises(MinitronError, match=message):
        kept_layers(4, drop_layers)
