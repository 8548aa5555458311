import json
import subprocess
import sys
import sysconfig

import pytest

from minitron.data import stdlib
from minitron.data.text import read_raw

NESTED = '''"""A module.

It says more.
"""

def one_line():
    """Left out."""

class Class:
    """A class.

        With an indented line.
    The end.
    """

    async def method(self):
        """A method,
        inside."""
        text = """not a
        docstring"""

escape = "\\d"
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of forty modules, a package, and what is none of its own."""
    root = tmp_path / "lib"
    for directory in ("package", "test", "site-packages/numpy", "package/tests"):
        (root / directory).mkdir(parents=True)
        (root / directory / "inside.py").write_text(NESTED)
    for number in range(40):
        (root / f"module{number}.py").write_text(NESTED.replace("A module", f"Module {number}"))
    (root / "plain.py").write_text("x = 1\n")
    (root / "empty.py").write_text("\n")
    (root / "broken.py").write_text('"""Not\nPython 3."""\nprint "x"')
    (root / "latin.py").write_bytes(b'"""caf\xe9\n"""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def texts(directory, name):
    raw = read_raw([directory / f"{name}.jsonl"])
    return [text for document in raw for text in document.parts()]


def test_the_library_is_found_without_its_tests_and_the_packages_installed():
    names = {path.name for path in stdlib.source_files()}
    assert {"textwrap.py", "decoder.py"} <= names  # a module and one of a package
    assert not {path for path in stdlib.source_files() if {"site-packages", "test"} & {*path.parts}}


def test_docstrings_are_those_of_several_lines():
    assert list(stdlib.docstrings(NESTED)) == [
        "A module.\n\nIt says more.",
        "A class.\n\n    With an indented line.\nThe end.",
        "A method,\ninside.",
    ]


def test_every_file_is_in_one_split(library, tmp_path):
    stdlib.write_corpus(tmp_path / "out" / "corpus")
    out = tmp_path / "out" / "corpus"
    sources = {split: texts(out, f"source.{split}") for split in ("train", "valid")}
    expected = [p.read_text() for p in stdlib.source_files() if p.name.startswith(("m", "i", "p"))]
    assert sorted(sources["train"] + sources["valid"]) == sorted(expected)
    assert len(expected) == 42
    assert not set(sources["train"]) & set(sources["valid"])
    assert 0 < len(sources["valid"]) < 12
    # Docstrings are split like the files that they come from.
    for split in ("train", "valid"):
        joined = ["\n\n".join(stdlib.docstrings(s)) for s in sources[split]]
        assert texts(out, f"docstrings.{split}") == [text for text in joined if text]


def test_the_corpus_is_the_same_every_time(library, tmp_path):
    for name in ("a", "b"):
        stdlib.write_corpus(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "docstrings.train.jsonl",
        "docstrings.valid.jsonl",
        "source.train.jsonl",
        "source.valid.jsonl",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "minitron.data.stdlib"]
    result = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    train, valid = (
        [json.loads(line) for line in (tmp_path / "out" / f"source.{split}.jsonl").open()]
        for split in ("train", "valid")
    )
    assert len(train) > 5 * len(valid) > 50
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        1,
        "usage: python -m minitron.data.stdlib OUT_DIR\n",
    )
