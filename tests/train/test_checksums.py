"""Checkpoints that are damaged, or cannot be written, end in one line on all ranks."""

import os
import re
import resource
import shutil
from unittest import mock

import pytest
from torch.distributed.checkpoint import FileSystemReader

from minitron.errors import MinitronError
from minitron.parallel import initialize
from minitron.sections.train import TrainConfig
from minitron.train import checksums
from minitron.train.checkpoint import (
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from minitron.train.checksums import CHECKSUMS, OPTIMIZER, WEIGHTS
from minitron.train.optimizer import build_optimizer, wrap_chunk
from tests.runs import VOCAB, build_model, run_on
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_llama(directory, vocab_size=VOCAB, tie_word_embeddings=True)
    return directory


def _save(parallel, model_dir, directory, sizes=None):
    """Save a checkpoint; the message if that fails. No file of a rank may exceed its size."""
    chunks = [build_model(model_dir, initialize(parallel))]
    optimizer = build_optimizer([wrap_chunk(chunk) for chunk in chunks], TrainConfig())
    optimizer.step()  # which makes its state
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes, before[1]))
    try:
        save_checkpoint(directory, Position(1, 1), chunks, optimizer)
    except MinitronError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("checkpoints")
    assert run_on("tp1", _save, model, directory) == [None]
    return checkpoint_path(directory, 1)


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_room(tmp_path, model):
    directory = tmp_path / "checkpoints"
    (directory / ".iter_0000007.partial").mkdir(parents=True)
    messages = run_on("dp2", _save, model, directory, 50_000)
    for message, reason in zip(messages, (".*", "on another rank"), strict=True):
        assert re.fullmatch(
            rf"{directory}/iter_0000001 cannot be written \(RuntimeError: {reason}; [\d.]+ GB are "
            r"free there\); make room, and go on with --resume",
            message,
        )
    assert list(directory.iterdir()) == []  # nor what attempts before have left
    assert run_on("dp2", _save, model, directory) == [None] * 2
    assert list_checkpoints(directory) == [1]


def test_a_checkpoint_that_not_all_ranks_can_read_is_refused(tmp_path, model):
    (message,) = run_on("tp1", _save_unreadable, model, tmp_path)
    assert message.endswith(
        "cannot be read by all ranks; write checkpoints to a file system that all nodes share"
    )
    assert list_checkpoints(tmp_path) == []


def _save_unreadable(parallel, model_dir, path):
    model = [build_model(model_dir, initialize(parallel))]
    with (
        mock.patch.object(checksums, "_checksum", return_value=None),
        pytest.raises(MinitronError) as caught,
    ):
        save_checkpoint(path, Position(1, 1), model)
    return str(caught.value)


def _load_damaged(parallel, model_dir, checkpoints):
    """The message that each checkpoint is refused with."""
    topology = initialize(parallel)
    messages = {}
    for name, path in checkpoints.items():
        try:
            load_checkpoint(path, [build_model(model_dir, topology)])
        except MinitronError as error:
            messages[name] = str(error)
    return messages


def _flip(file, offset):
    file.seek(offset)
    (byte,) = file.read(1)
    file.seek(offset)
    file.write(bytes([byte ^ 1]))
    file.flush()


def _flipped_bits(parallel, path):
    """Which of the parts find the first and the last byte of each tensor changed."""
    initialize(parallel)

    def is_refused(*parts):
        try:
            checksums.verify(path, parts)
        except MinitronError:
            return True
        return False

    places = [
        (item.fqn, place.relative_path, offset)
        for item, place in FileSystemReader(path).read_metadata().storage_data.items()
        for offset in (place.offset, place.offset + place.length - 1)
    ]
    places += [("", name, 9) for name in ("common.pt", ".metadata", "metadata.json")]
    assert not is_refused(WEIGHTS, OPTIMIZER)
    found = []
    for name, file_name, offset in places:
        with (path / file_name).open("r+b") as file:
            _flip(file, offset)
            found.append((name, is_refused(WEIGHTS), is_refused(WEIGHTS, OPTIMIZER)))
            _flip(file, offset)
    return found


def test_a_flipped_bit_is_found_where_it_is_read(tmp_path, good):
    """That of the optimizer's state does not stop an export."""
    (found,) = run_on("tp1", _flipped_bits, shutil.copytree(good, tmp_path / "copy"))
    names = [name for name, *_ in found]
    assert found == [(name, not name.startswith("optimizer."), True) for name in names]
    assert {
        "decoder.final_layernorm.weight",
        "",
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
    } <= {*names}


def test_a_checkpoint_that_cannot_be_loaded_is_refused(tmp_path, model, good):
    shard = min(path.name for path in good.glob("*.distcp"))
    checkpoints = {"absent": tmp_path / "absent"}
    damaged = ("lost shard", "cut shard", "cut index", "cut common", "other model")
    for name in (*damaged, "flipped bit", "no shard"):
        checkpoints[name] = shutil.copytree(good, tmp_path / name)
    for name in damaged:  # as a checkpoint that came without checksums
        (checkpoints[name] / CHECKSUMS).unlink()
    (checkpoints["no shard"] / shard).unlink()
    with (checkpoints["flipped bit"] / shard).open("r+b") as file:
        _flip(file, 9000)  # of the weights
    (checkpoints["lost shard"] / shard).unlink()
    os.truncate(checkpoints["cut shard"] / shard, 1000)
    os.truncate(checkpoints["cut index"] / ".metadata", 100)
    os.truncate(checkpoints["cut common"] / "common.pt", 100)
    other = tmp_path / "model"
    save_llama(other, vocab_size=VOCAB, num_hidden_layers=3, tie_word_embeddings=True)

    of_other = {"other model": checkpoints.pop("other model")}
    messages = [
        run_on("dp2", _load_damaged, model, checkpoints),
        run_on("dp2", _load_damaged, other, of_other),
    ]
    for ranks in messages:
        assert ranks[0] == ranks[1]  # nobody is left waiting
    found = messages[0][0] | messages[1][0]
    assert found["absent"] == (
        f"{tmp_path / 'absent'} is not a torch_dist checkpoint (it has no metadata.json)"
    )
    remedy = "the checkpoint is damaged: take another, or delete it to resume from the one before"
    assert found["no shard"] == f"{tmp_path / 'no shard' / shard} cannot be read; {remedy}"
    assert re.fullmatch(
        rf"{tmp_path / 'flipped bit' / shard} has CRC-32 \d+, checksums.json says \d+; {remedy}",
        found["flipped bit"],
    )
    for name, reason in (
        ("lost shard", f"FileNotFoundError: .*{shard}"),
        ("cut shard", "EOFError"),
        ("cut index", "pickle data was truncated"),
        ("cut common", "RuntimeError"),
        ("other model", r"Global shape mismatch .*\[4, 32\].* and expected \(\(3, 32\)\)"),
    ):
        path = (checkpoints | of_other)[name]
        pattern = (
            rf"{path} cannot be loaded \(.*{reason}.*\); it is damaged or of another model: .*"
        )
        assert re.fullmatch(pattern, found[name]), found[name]  # one line, for a dot is no newline
