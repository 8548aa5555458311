import struct
import subprocess
import sys

import numpy as np
import pytest

from minitron.data import indexed
from minitron.data.indexed import TokenStream, as_prefix
from minitron.errors import MinitronError

DOCS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_reads_what_megatron_reads(write_tokens, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 127, size) for size in (3, 1, 0, 50, 7)]
    prefix = write_tokens(docs, dtype=dtype)
    theirs = IndexedDataset(str(prefix))
    ours = TokenStream(prefix)
    assert ours.dtype == theirs.index.dtype
    assert ours.num_documents == len(theirs.document_indices) - 1 == 5
    assert ours.num_tokens == theirs.sequence_lengths.sum() == 61
    tokens = ours.read(0, 61)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, np.concatenate([theirs[i] for i in range(5)]))
    np.testing.assert_array_equal(ours.read(2, 9), np.concatenate(docs)[2:9])


def test_documents_of_several_sequences(tmp_path, write_tokens):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write_tokens(DOCS)  # imports megatron in the right order
    builder = IndexedDatasetBuilder(f"{tmp_path}/multi.bin", dtype=np.int32, multimodal=True)
    builder.add_document(np.arange(6), [2, 4], modes=[0, 1])
    builder.add_document(np.array([99]), [1], modes=[0])
    builder.finalize(f"{tmp_path}/multi.idx")
    stream = TokenStream(tmp_path / "multi")
    assert stream.num_documents == 2
    assert stream.read(0, 7).tolist() == [0, 1, 2, 3, 4, 5, 99]
    with pytest.raises(MinitronError, match=r"token 6, in document 1 .*id 99"):
        stream.check_ids(50)


def test_prefix_is_taken_in_any_spelling(write_tokens):
    prefix = write_tokens(DOCS, name="v1.5-data")
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        assert as_prefix(path) == prefix
        assert TokenStream(path).num_tokens == 8


def test_arrays_outlive_the_stream(write_tokens):
    # megatron-core's reader segfaults here.
    code = (
        "import sys; from minitron.data.indexed import TokenStream; s = TokenStream(sys.argv[1]);"
        "a = s.read(0, 8); del s; import gc; gc.collect(); print(a.sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_tokens(DOCS))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "68"


def test_read_outside_the_file_is_a_bug(write_tokens):
    stream = TokenStream(write_tokens(DOCS))
    for start, stop in ((-1, 2), (0, 9), (3, 2)):
        with pytest.raises(ValueError, match="not within 8 tokens"):
            stream.read(start, stop)


def patched(prefix, offset, data):
    """Overwrite bytes of the index."""
    path = as_prefix(prefix).with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


HEADER = 34
# DOCS: 3 sequences, so lengths at 34, pointers at 46, 4 document boundaries at 70.
DAMAGE = {
    "magic": (0, b"X", "does not start as a Megatron index"),
    "version": (9, struct.pack("<Q", 2), "version is 2, known is 1"),
    "dtype": (17, b"\x09", "dtype code is 9"),
    "float dtype": (17, b"\x06", "dtype code is 6"),
    "sequence count": (18, struct.pack("<Q", 2**60), "1152921504606846976 sequences"),
    "document count": (26, struct.pack("<Q", 5), "5 document boundaries take 110"),
    "negative length": (HEADER + 4, struct.pack("<i", -1), "sequence 1 has length -1"),
    "wrong length": (HEADER + 4, struct.pack("<i", 2), "sequence 2 starts at byte 8, .* at 10"),
    "last length": (HEADER + 8, struct.pack("<i", 9), "16 bytes, .* 13 tokens of 2 bytes = 26"),
    "pointer": (46 + 8, struct.pack("<q", 4), "sequence 1 starts at byte 4, .* end at 6"),
    "other dtype": (17, b"\x04", "sequence 1 starts at byte 6, .* end at 12"),
    "first document": (70, struct.pack("<q", 1), "span sequences 1 to 3 of 3"),
    "last document": (70 + 24, struct.pack("<q", 2), "span sequences 0 to 2 of 3"),
    "document order": (70 + 8, struct.pack("<q", 3), "document 1 ends before it starts"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_index_is_refused(write_tokens, what):
    prefix = write_tokens(DOCS)
    offset, data, message = DAMAGE[what]
    patched(prefix, offset, data)
    with pytest.raises(MinitronError, match=message) as caught:
        TokenStream(prefix)
    assert str(prefix) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_is_found_across_chunks(write_tokens, monkeypatch):
    monkeypatch.setattr(indexed, "_CHUNK", 2)
    prefix = write_tokens([[1, 2]] * 7)
    assert TokenStream(prefix).read(0, 14).tolist() == [1, 2] * 7
    for sequence in range(1, 7):
        prefix = write_tokens([[1, 2]] * 7)
        patched(prefix, HEADER + 7 * 4 + sequence * 8, struct.pack("<q", 1000))
        with pytest.raises(MinitronError, match=f"sequence {sequence} starts at byte 1000"):
            TokenStream(prefix)
    for document in range(1, 7):
        prefix = write_tokens([[1, 2]] * 7)
        patched(prefix, HEADER + 7 * 12 + document * 8, struct.pack("<q", 7 if document < 6 else 0))
        with pytest.raises(MinitronError, match="ends before it starts"):
            TokenStream(prefix)


def test_truncated_files_are_refused(write_tokens):
    for size in range(0, HEADER + 60, 7):
        prefix = write_tokens(DOCS)
        with open(f"{prefix}.idx", "r+b") as file:
            file.truncate(size)
        with pytest.raises(MinitronError, match=r"tokens\.idx is not a usable index"):
            TokenStream(prefix)
    prefix = write_tokens(DOCS)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(14)
    with pytest.raises(MinitronError, match=r"14 bytes, .* 8 tokens of 2 bytes = 16"):
        TokenStream(prefix)


def test_missing_and_empty_files_are_refused(write_tokens):
    prefix = write_tokens(DOCS)
    (prefix.parent / "tokens.idx").unlink()
    with pytest.raises(MinitronError, match=r"tokens\.idx does not exist; .* a pair"):
        TokenStream(prefix)
    with pytest.raises(MinitronError, match="lists no documents"):
        TokenStream(write_tokens([]))
    with pytest.raises(MinitronError, match="holds no tokens"):
        TokenStream(write_tokens([[], []]))


def test_bad_id_names_file_and_document(write_tokens, monkeypatch):
    stream = TokenStream(write_tokens(DOCS))
    stream.check_ids(13)
    with pytest.raises(MinitronError, match=r"tokens\.bin: token 7, in document 2 .* id 12, .* 12"):
        stream.check_ids(12)
    monkeypatch.setattr(indexed, "_CHUNK", 2)
    with pytest.raises(MinitronError, match=r"token 3, in document 1 .* id 8, .* has 8;"):
        stream.check_ids(8)
    # Empty documents before the one that holds it do not count for it.
    stream = TokenStream(write_tokens([[1], [], [], [-2, 3]], dtype=np.int32))
    with pytest.raises(MinitronError, match=r"token 1, in document 3 .* id -2"):
        stream.check_ids(100)


def test_file_whose_dtype_cannot_hold_a_bad_id_is_not_scanned(write_tokens, monkeypatch):
    stream = TokenStream(write_tokens([[65535]]))
    monkeypatch.setattr(stream, "_tokens", None)
    stream.check_ids(65536)


def test_fingerprint_is_of_the_tokens_alone(write_tokens):
    tokens = np.random.default_rng(0).integers(200, size=300_000)
    first = TokenStream(write_tokens([tokens])).fingerprint
    assert 0 <= first < 1 << 63
    parts = [tokens[:1000], tokens[1000:]]
    assert TokenStream(write_tokens(parts, name="b", dtype=np.int32)).fingerprint == first
    assert TokenStream(write_tokens([tokens[:-1]], name="c")).fingerprint != first
    for position in (0, 4095, 299_999):
        changed = tokens.copy()
        changed[position] += 1
        assert TokenStream(write_tokens([changed], name="d")).fingerprint != first
