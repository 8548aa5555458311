"""What pruning writes is our model on any ranks, and the same directory again."""

import pytest

from minitron.model import hf
from tests.model.round_trip import check_round_trip, logits_and_copies
from tests.prune.pruned import prune
from tests.prune.scored import random_scores
from tests.runs import VOCAB, run_on
from tests.tiny import VARIANTS, save_llama

SHAPES = {
    "width": {"hidden_size": 24, "ffn_hidden_size": 20},
    "width and depth": {"hidden_size": 24, "ffn_hidden_size": 20, "num_layers": 2},
    "named layers": {"drop_layers": [1, 3]},
    "heads": {"num_attention_heads": 4},
    "heads across groups": {"num_attention_heads": 4, "head_ranking": "across"},
    "merged heads": {"num_attention_heads": 4, "merge_heads": "plus"},
    "groups": {"num_query_groups": 2},
    "mean groups": {"num_query_groups": 2, "group_reduction": "mean"},
    "all at once": {
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_layers": 2,
        "num_query_groups": 2,
        "group_reduction": "mean",
    },
}


@pytest.fixture(scope="module", params=["gqa", "everything"])
def pruned(request, tmp_path_factory):
    """Every pruned shape of an untied and a tied model: directories and transformers' models."""
    root = tmp_path_factory.mktemp("pruned")
    variant = {"num_key_value_heads": 4, **VARIANTS[request.param], "vocab_size": VOCAB}
    save_llama(root / "source", **variant)
    scores = random_scores(hf.read_architecture(root / "source"))
    return [
        (root / name, prune(root / "source", root / name, scores=scores, **keys))
        for name, keys in SHAPES.items()
    ]


@pytest.mark.parametrize("topology", ["tp2+sp", "pp2"])
def test_every_pruned_shape(pruned, tmp_path, topology):
    directories = [directory for directory, _ in pruned]
    ranks = run_on(topology, logits_and_copies, directories, tmp_path)
    for directory, model in pruned:
        check_round_trip(directory, model, ranks, tmp_path)
