"""What pruning writes, and what it refuses to read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.weights import INDEX_FILE, SINGLE_FILE, WeightReader, WeightWriter
from minitron.prune import pruning
from minitron.prune.pruning import PRUNING_FILE
from tests.prune.pruned import ARCH, prune
from tests.prune.scored import random_scores
from tests.tiny import VARIANTS, save_llama


def test_every_tensor_keeps_its_dtype(tmp_path):
    model = save_llama(tmp_path / "model").bfloat16()
    tensors = {
        name: tensor.float() if "norm" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, tmp_path / "model" / SINGLE_FILE)
    prune(tmp_path / "model", tmp_path / "out", scores=random_scores(ARCH), hidden_size=8)
    pruned = load_file(tmp_path / "out" / SINGLE_FILE)
    assert {name: t.dtype for name, t in pruned.items()} == {n: t.dtype for n, t in tensors.items()}
    config = json.loads((tmp_path / "out" / hf.CONFIG_FILE).read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_the_rest_of_the_directory(tmp_path):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"\xfftokenizer\r\n")
    scores = random_scores(ARCH)
    prune(
        tmp_path / "model",
        tmp_path / "out",
        scores=scores,
        num_attention_heads=4,
        ffn_hidden_size=9,
        drop_layers=[2],
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\xfftokenizer\r\n"
    config = json.loads((tmp_path / "out" / hf.CONFIG_FILE).read_text())
    assert config["eos_token_id"] == [2, 7]
    assert config["head_dim"] == 4
    record = json.loads((tmp_path / "out" / PRUNING_FILE).read_text())
    assert record["layers"] == [0, 2, 3]
    assert record["hidden"] is None
    assert [len(row) for row in record["ffn"]] == [9, 9, 9]
    before = load_file(tmp_path / "model" / SINGLE_FILE)
    after = load_file(tmp_path / "out" / SINGLE_FILE)
    for new, old in enumerate(record["layers"]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)][record["ffn"][new]])
        heads = before[f"model.layers.{old}.self_attn.q_proj.weight"].view(8, 4, 32)
        kept = after[f"model.layers.{new}.self_attn.q_proj.weight"].view(4, 4, 32)
        assert torch.equal(kept, heads[record["heads"][new]])


def test_dropped_layers_are_not_read(tmp_path):
    """A model whose dropped layers are broken can be repaired by dropping them."""
    save_llama(tmp_path / "model")
    break_tensor(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", float("nan"))
    prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_a_disk_that_loses_what_was_written(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    write = WeightWriter.write

    def lose(self, tensor_name, tensor, first_row):
        write(self, tensor_name, tensor.roll(1, 0) if tensor_name == name else tensor, first_row)

    monkeypatch.setattr(WeightWriter, "write", lose)
    with pytest.raises(MinitronError, match=f"out: {name} does not hold what was written"):
        prune(tmp_path / "model", tmp_path / "out", scores=random_scores(ARCH), hidden_size=8)


def break_tensor(directory, name, value, rows=slice(None)):
    tensors = load_file(directory / SINGLE_FILE)
    tensors[name][rows] = value
    save_file(tensors, directory / SINGLE_FILE)


@pytest.mark.parametrize("block_bytes", [1, 300])
@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": 24, "ffn_hidden_size": 17, "num_layers": 3},
        {"num_query_groups": 2, "group_reduction": "mean", "hidden_size": 24},
        {"num_attention_heads": 4, "merge_heads": "plus"},
        {"num_attention_heads": 4, "head_ranking": "across"},
    ],
)
def test_blocks_of_any_size_write_the_same(tmp_path, monkeypatch, keys, block_bytes):
    save_llama(tmp_path / "model", **VARIANTS["everything"])
    scores = random_scores(hf.read_architecture(tmp_path / "model"))
    for out in ("whole", "cut"):
        prune(tmp_path / "model", tmp_path / out, scores=scores, **keys)
        monkeypatch.setattr(pruning, "BLOCK_BYTES", block_bytes)
    files = [(tmp_path / out / SINGLE_FILE).read_bytes() for out in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": 32, "ffn_hidden_size": 128},
        {"num_layers": 2},
        {"num_attention_heads": 8, "merge_heads": "plus"},
        {"num_query_groups": 2, "group_reduction": "mean"},
    ],
    ids=["width", "depth", "merged heads", "averaged groups"],
)
def test_pruning_holds_blocks_and_no_tensor(tmp_path, monkeypatch, keys):
    """A block of every second row and column spans some four times its size, by chance more."""
    block = 1024
    monkeypatch.setattr(pruning, "BLOCK_BYTES", block)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 512, "head_dim": 4}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    save_llama(tmp_path / "model", **sizes, **heads)
    arch = hf.read_architecture(tmp_path / "model")
    read, held = WeightReader.read, []

    def watch(self, name, *index):
        tensor = read(self, name, *index)
        held.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(WeightReader, "read", watch)
    prune(tmp_path / "model", tmp_path / "out", scores=random_scores(arch), **keys)
    assert max(held) <= 8 * block
    largest = max(info.num_bytes for info in hf.tensor_infos(arch, torch.float32).values())
    assert largest > 100 * block


def test_some_rows_may_be_zero(tmp_path, monkeypatch):
    """An unused token's, even where it is a block by itself, and the last one."""
    monkeypatch.setattr(pruning, "BLOCK_BYTES", 1)
    save_llama(tmp_path / "model")
    break_tensor(tmp_path / "model", hf.EMBEDDING, 0.0, slice(-3, None))
    prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensor_that_is_not_finite(tmp_path, value):
    save_llama(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE_FILE)
    tensors["lm_head.weight"][3, 4] = value
    save_file(tensors, tmp_path / "model" / SINGLE_FILE)
    with pytest.raises(MinitronError, match=r"model: lm_head.weight holds NaN or infinity"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_tensor_of_zeros(tmp_path):
    save_llama(tmp_path / "model")
    break_tensor(tmp_path / "model", "model.layers.3.mlp.up_proj.weight", 0.0)
    with pytest.raises(MinitronError, match=r"kept of model.layers.3.mlp.up_proj.weight is all ze"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_biases_may_be_zero(tmp_path):
    save_llama(tmp_path / "model", mlp_bias=True)
    break_tensor(tmp_path / "model", "model.layers.3.mlp.up_proj.bias", 0.0)
    prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_missing_shard(tmp_path):
    save_llama(tmp_path / "model", shard="20KB")
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    (tmp_path / "model" / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(MinitronError, match="is missing; restore the file"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_flipped_bit_in_a_model_with_a_manifest(tmp_path):
    save_llama(tmp_path / "model")
    artifact.write_manifest(tmp_path / "model", stage="train", recipe={}, parents={})
    path = tmp_path / "model" / SINGLE_FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(MinitronError, match=r"model.safetensors does not match its SHA-256"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])
