"""What tests of pruning share."""

import torch
from transformers import LlamaForCausalLM

from minitron.model import hf
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.target import target_shape
from minitron.sections.prune import PruneConfig
from tests.tiny import logits, tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())  # 4 layers, 32, 48, 8 heads, 2 groups


def prune(source, out, *, scores=None, **keys):
    """What the launcher does, without its recipe; returns the pruned model of transformers."""
    config = PruneConfig(**keys)
    arch = hf.read_architecture(source)
    how = {k: v for k, v in keys.items() if k in ("head_ranking", "group_reduction", "merge_heads")}
    plan = plan_pruning(arch, target_shape(config, arch), scores, config.drop_layers, **how)
    out.mkdir()
    prune_model(source, out, plan)
    model, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(report.values())
    return model


def assert_same_model(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(found), logits(expected))


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
