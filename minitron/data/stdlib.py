"""Real text that every machine has: the Python standard library, as a small corpus.

    python -m minitron.data.stdlib OUT_DIR

writes its source files and, as a second and shifted distribution, their docstrings, each as JSON
lines split by file into training and validation: {source,docstrings}.{train,valid}.jsonl.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not the library itself: installed packages, and what most distributions leave out.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}

# One file in so many is held out, chosen by its name so that every Python version agrees.
_HELD_OUT = 12


def source_files() -> list[Path]:
    """The standard library's Python files, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
    )


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, level by level; those of a line left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own string escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and "\n" in text:
                yield text


def write_corpus(out: Path) -> None:
    """Write the four files."""
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}.{split}" for kind in ("source", "docstrings") for split in ("train", "valid")]
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in names}
    for path in source_files():
        try:
            source = path.read_text(encoding="utf-8")
            texts = list(docstrings(source))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files are there to be unreadable
        held_out = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % _HELD_OUT == 0
        split = "valid" if held_out else "train"
        if source.strip():
            files[f"source.{split}"].write(json.dumps({"text": source}) + "\n")
        if texts:
            joined = "\n\n".join(texts)
            files[f"docstrings.{split}"].write(json.dumps({"text": joined}) + "\n")
    for file in files.values():
        file.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m minitron.data.stdlib OUT_DIR")
    write_corpus(Path(sys.argv[1]))
