import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from minitron.errors import MinitronError
from minitron.model import weights
from minitron.model.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    WeightReader,
    WeightWriter,
)
from tests.tiny import logits, save_llama


def infos_of(tensors):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(directory, tensors, **options):
    writer = WeightWriter(directory, infos_of(tensors), **options)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "odd.bias": torch.randn(3).bfloat16(),  # an odd number of bytes would misalign what follows
        "half": torch.randn(5, 7).half(),
        "single": torch.randn(4, 6),
        "double": torch.randn(2, 3, 4).double(),
        "brain": torch.randn(9, 2).bfloat16(),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# Writing.


def test_safetensors_reads_what_the_writer_wrote(tmp_path, tensors):
    write(tmp_path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE_FILE]
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)


def test_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    tensors = {name: torch.randn(4, 3) for name in ("a", "b", "c")}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    ours = (tmp_path / SINGLE_FILE).read_bytes()
    assert ours == (tmp_path / "reference.safetensors").read_bytes()


def test_every_tensor_is_aligned_to_its_dtype(tmp_path, tensors):
    write(tmp_path, tensors)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % tensors[name].dtype.itemsize == 0


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path):
    model = save_llama(tmp_path / "reference", shard="20KB")
    tensors = model.state_dict()
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", tensors, max_shard_bytes=20_000)
    names = {p.name for p in (tmp_path / "ours").iterdir()}
    shards = sorted(names - {INDEX_FILE})
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "ours" / s).stat().st_size < 24_000 for s in shards)
    index = json.loads((tmp_path / "ours" / INDEX_FILE).read_text())
    reference = json.loads((tmp_path / "reference" / INDEX_FILE).read_text())
    assert index["metadata"] == reference["metadata"]
    assert index["weight_map"].keys() == reference["weight_map"].keys()
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "ours" / shard)[name], tensors[name])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_opens_what_the_writer_wrote(tmp_path, max_shard_bytes):
    model = save_llama(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    write(tmp_path, model.state_dict(), max_shard_bytes=max_shard_bytes)
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(loaded), logits(model))


def test_several_writers_share_one_directory(tmp_path, tensors):
    writers = [WeightWriter(tmp_path, infos_of(tensors), max_shard_bytes=64) for _ in range(2)]
    writers[0].create()
    for i, name in enumerate(reversed(tensors)):
        writers[i % 2].write(name, tensors[name])
    for writer in writers:
        writer.close()
    reader = WeightReader(tmp_path)
    assert_same({name: reader.read(name) for name in reader.infos}, tensors)


def test_writer_converts_to_the_planned_dtype_and_takes_views(tmp_path):
    tensor = torch.randn(6, 4)
    writer = WeightWriter(tmp_path, {"t": TensorInfo((4, 6), torch.bfloat16)})
    writer.create()
    writer.write("t", tensor.T.requires_grad_())
    writer.close()
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["t"], tensor.T.bfloat16())


def test_writer_goes_on_after_a_short_write(tmp_path, tensors, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)


def test_full_disk(tmp_path, tensors, monkeypatch):
    def pwrite(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(MinitronError, match=r"safetensors cannot be written \(No space left"):
        write(tmp_path, tensors)


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(tmp_path):
    infos = {"t": TensorInfo((1 << 42,), torch.float32)}  # 16 TB
    with pytest.raises(MinitronError, match=r"safetensors cannot be written \(.*\); make room or"):
        WeightWriter(tmp_path, infos).create()


def test_writer_without_blocks_set_aside(tmp_path, tensors, monkeypatch):
    """A C library or a file system that cannot do it leaves holes, which are filled later."""
    monkeypatch.setattr(weights.ctypes, "CDLL", lambda *_, **__: object())
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)


def test_writer_refuses_another_shape(tmp_path):
    writer = WeightWriter(tmp_path, {"t": TensorInfo((4, 6), torch.float32)})
    writer.create()
    with pytest.raises(ValueError, match=r"t: \(6, 4\) at row 0, planned \(4, 6\)"):
        writer.write("t", torch.zeros(6, 4))
    for rows, first in ((2, 3), (1, 4), (2, None)):
        with pytest.raises(ValueError, match=rf"t: \({rows}, 6\) at row {first or 0}, planned"):
            writer.write("t", torch.zeros(rows, 6), first)


def test_a_tensor_may_come_row_by_row(tmp_path, tensors):
    writer = WeightWriter(tmp_path, infos_of(tensors))
    writer.create()
    for name, tensor in tensors.items():
        for row in reversed(range(len(tensor))):
            writer.write(name, tensor[row : row + 1], row)
    writer.close()
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)


# Reading.


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reader_reads_what_transformers_wrote(tmp_path, shard):
    model = save_llama(tmp_path, shard=shard)
    reader = WeightReader(tmp_path)
    assert_same({name: reader.read(name) for name in reader.infos}, dict(model.state_dict()))


def test_reader_reads_slices(tmp_path, tensors):
    write(tmp_path, tensors)
    reader = WeightReader(tmp_path)
    assert "single" in reader
    assert "other" not in reader
    assert reader.infos == infos_of(tensors)
    t = tensors["single"]
    assert torch.equal(reader.read("single", slice(1, 3)), t[1:3])
    assert torch.equal(reader.read("single", slice(None), slice(2, 5)), t[:, 2:5])
    assert torch.equal(reader.read("single", slice(3, None), slice(0, 1)), t[3:, :1])
    assert torch.equal(reader.read("double", slice(0, 1), slice(1, 2)), tensors["double"][:1, 1:2])


def test_reader_refuses_a_step_that_safetensors_would_ignore(tmp_path, tensors):
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match="step"):
        WeightReader(tmp_path).read("single", slice(0, 4, 2))


def test_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    save_llama(tmp_path, seed=1, shard="20KB")
    model = save_llama(tmp_path / "second", seed=2)
    (tmp_path / "second" / SINGLE_FILE).rename(tmp_path / SINGLE_FILE)
    name = "model.norm.weight"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    assert torch.equal(loaded, model.state_dict()[name])
    assert torch.equal(WeightReader(tmp_path).read(name), loaded)


def test_reader_follows_links_as_the_hub_cache_has_them(tmp_path, tensors):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs", tensors)
    (tmp_path / "snapshot" / SINGLE_FILE).symlink_to(tmp_path / "blobs" / SINGLE_FILE)
    assert torch.equal(WeightReader(tmp_path / "snapshot").read("single"), tensors["single"])


# Bad input.


def test_missing_directory(tmp_path):
    with pytest.raises(MinitronError, match="absent is not a directory; give a Hugging Face"):
        WeightReader(tmp_path / "absent")


def test_directory_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MinitronError, match=r"has neither model.safetensors nor .*index.json"):
        WeightReader(tmp_path)


def test_unknown_tensor(tmp_path, tensors):
    write(tmp_path, tensors)
    with pytest.raises(MinitronError, match="has no tensor other"):
        WeightReader(tmp_path).read("other")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(tmp_path, tensors, kept):
    write(tmp_path, tensors)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(MinitronError, match=r"model.safetensors is not a readable .* file \(.+\)"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"not safetensors at all", b"{}" * 40])
def test_garbage_file(tmp_path, content):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(MinitronError, match="not a readable safetensors file"):
        WeightReader(tmp_path)


def test_a_directory_in_the_place_of_a_file(tmp_path):
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(MinitronError, match="not a readable safetensors file"):
        WeightReader(tmp_path)


def test_unknown_dtype(tmp_path):
    save_file({"t": torch.zeros(4, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    with pytest.raises(MinitronError, match=r"t has dtype I8; minitron reads .*BF16.* quantised"):
        WeightReader(tmp_path)


def sharded(directory):
    save_llama(directory, shard="20KB")
    return json.loads((directory / INDEX_FILE).read_text())


def test_missing_shard(tmp_path):
    shard = sharded(tmp_path)["weight_map"]["model.norm.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(MinitronError, match=f"{shard} is missing; restore the file"):
        WeightReader(tmp_path)


def test_index_that_points_to_a_shard_without_the_tensor(tmp_path):
    index = sharded(tmp_path)
    shards = sorted(set(index["weight_map"].values()))
    wrong = next(s for s in shards if s != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = wrong
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(MinitronError, match=f"places model.norm.weight in {wrong}, which lacks it"):
        WeightReader(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 3, None]
)
def test_index_that_points_outside(tmp_path, shard):
    write_to = tmp_path / "model"
    write_to.mkdir()
    (write_to / INDEX_FILE).write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(MinitronError, match=r"which is no plain file name"):
        WeightReader(write_to)


@pytest.mark.parametrize("shard", ["..", ".", ""])
def test_index_that_points_to_a_directory(tmp_path, shard):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(MinitronError):
        WeightReader(tmp_path)


@pytest.mark.parametrize("index", [{}, [], None, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_map(tmp_path, index):
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(MinitronError, match="has no weight_map; restore the file"):
        WeightReader(tmp_path)


def test_index_that_is_no_json(tmp_path):
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(MinitronError, match="is not valid JSON"):
        WeightReader(tmp_path)
