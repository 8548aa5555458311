"""Output directories: complete or absent, and able to say where they come from.

A stage writes into a temporary sibling of its `--out` and renames it once everything, the manifest
last, is on disk. `manifest.json` names the stage, its command and resolved recipe, the parents by
fingerprint, the versions, the results, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform as host
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from minitron.errors import MinitronError
from minitron.metrics import METRICS

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
INPUTS = "inputs.json"
LOCK = ".lock"
# What a directory keeps of how it was made, which makes it no other.
_RECORDS = (RECIPE, INPUTS, METRICS)
# Bytes that a fingerprint reads of a file's begin, and pieces of the whole and bytes of each.
_BEGIN, _PIECES, _PIECE = 1 << 20, 64, 4096
_REMEDY = "delete it to use the directory unchecked, or create the directory again"
_VERSIONED = ("minitron", "torch", "megatron-core", "safetensors", "tokenizers", "sentencepiece")


def check_out(
    out: Path, *, overwrite: bool = False, resume: bool = False, inputs: Iterable[Path | None] = ()
) -> None:
    """Refuse an output path that cannot be written, or that would destroy or mix up what is there.

    Args:
        out: the directory to write.
        overwrite: replace what minitron wrote there.
        resume: continue what is there.
        inputs: paths that the stage reads and must not replace; None stands for none.

    Raises:
        MinitronError: `out` is a file, cannot be created, or holds the working directory; or it is
            not empty, without `overwrite` or `resume`; or `overwrite` would delete an input, or
            what minitron did not write; or `resume` would continue what is no run.
    """
    try:
        _check_place(out)
        entries = sorted({*os.listdir(out)} - {LOCK}) if out.exists() else []
    except OSError as error:
        raise _unusable(out, error) from None
    if resume:
        if entries and RECIPE not in entries:
            raise MinitronError(
                f"--resume cannot continue {out}, which is no run (it has no {RECIPE}); "
                "correct --out, or choose another directory"
            )
        return
    place = Path(os.path.realpath(out))
    if Path.cwd().is_relative_to(place):
        raise MinitronError(
            f"--out {out} is the working directory or holds it, and would be replaced as a whole; "
            "give a directory below it"
        )
    if not entries:
        return
    if not overwrite:
        more = f" and {len(entries) - 1} more" if entries[1:] else ""
        raise MinitronError(
            f"--out {out} is not empty (it holds {entries[0]}{more}); "
            "choose another directory or add --overwrite"
        )
    if MANIFEST not in entries and RECIPE not in entries:
        raise MinitronError(
            f"--overwrite would delete {out}, which minitron did not write (it has neither "
            f"{MANIFEST} nor {RECIPE}); delete it yourself or choose another directory"
        )
    for path in filter(None, inputs):
        if Path(os.path.realpath(path)).is_relative_to(place):
            raise MinitronError(
                f"--overwrite would delete {out}, but this stage reads {path}; "
                "choose another directory"
            )


def _check_place(out: Path) -> None:
    """Refuse a path that is no directory and can become none."""
    if out.is_dir():
        return
    if out.exists():
        raise MinitronError(f"--out {out} is a file; give a directory that does not exist yet")
    if out.is_symlink():
        raise MinitronError(
            f"--out {out} is a symbolic link to {os.readlink(out)}, which does not exist; "
            "create that directory or choose another"
        )
    parent = next(p for p in Path(os.path.realpath(out)).parents if os.path.lexists(p))
    if not parent.is_dir():
        raise MinitronError(f"--out {out} cannot be created: {parent} is a file; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MinitronError(
            f"--out {out} cannot be created: {parent} is not writable; "
            "choose another directory or change its permissions"
        )


def _unusable(out: Path, error: OSError) -> MinitronError:
    return MinitronError(f"--out {out} cannot be used ({error.strerror}); choose another directory")


def create_directory(out: Path) -> None:
    """Create a directory and its parents; one that exists is fine.

    Raises:
        MinitronError: the system refuses.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(out, error) from None


def prepare(out: Path, *, overwrite: bool = False) -> Path:
    """Create an empty temporary sibling of `out`, to take its name when it is complete."""
    check_out(out, overwrite=overwrite)
    out = Path(os.path.realpath(out))  # beside what a symbolic link names, not beside the link
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    create_directory(temporary)
    return temporary


@contextlib.contextmanager
def publish(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that takes its name when the block ends without an error.

    One process calls this; `minitron.parallel.publish` is for all ranks together.
    """
    temporary = prepare(out, overwrite=overwrite)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replace_directory(temporary, out)


def replace_directory(new: Path, out: Path) -> None:
    """Give the directory `new` the name `out`; an older `out` is deleted once `new` is in place."""
    out = Path(os.path.realpath(out))
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    new.rename(out)
    shutil.rmtree(old)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MinitronError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise MinitronError(f"{path} does not exist") from None
    except OSError as error:
        raise MinitronError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MinitronError(f"{path} is not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in 16 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """A short hash that identifies a model, score or data path without reading all its bytes.

    A directory that minitron wrote is identified by the names and hashes in its manifest, but for
    the records of how it was made: a run that is finished again makes the same model. Any other is
    identified by the names and sizes of its files, the first MiB of each (where safetensors say
    what they hold) and pieces spread evenly over the larger ones: files that agree in all that and
    differ between the pieces are not told apart.

    Raises:
        MinitronError: there is nothing at `path`, or its manifest is damaged.
    """
    if path.is_file():
        return sha256(path)[:16]
    if not path.is_dir():
        raise MinitronError(f"{path} does not exist")
    digest = hashlib.sha256()
    if manifest := read_manifest(path):
        for name, entry in sorted(manifest["files"].items()):
            if name not in _RECORDS:
                digest.update(f"{name}:{entry['sha256']};".encode())
        return digest.hexdigest()[:16]
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as content:
            digest.update(content.read(_BEGIN))
            if size > _BEGIN:
                for piece in range(_PIECES):
                    content.seek((size - _PIECE) * piece // (_PIECES - 1))
                    digest.update(content.read(_PIECE))
    return digest.hexdigest()[:16]


def write_manifest(
    directory: Path,
    *,
    stage: str,
    recipe: Mapping[str, Any],
    parents: Mapping[str, Path],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Hash every file in `directory` (not its subdirectories) and write `manifest.json`.

    The command and the number of ranks are those of this process.
    """
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name not in (MANIFEST, LOCK))
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = list(pool.map(sha256, files))
    write_json(
        directory / MANIFEST,
        {
            "stage": stage,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": sys.argv,
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "recipe": dict(recipe),
            "parents": {
                role: {"path": str(path), "fingerprint": fingerprint(path)}
                for role, path in parents.items()
            },
            "versions": _versions(),
            "metrics": dict(metrics or {}),
            "files": {
                p.name: {"bytes": p.stat().st_size, "sha256": h}
                for p, h in zip(files, hashes, strict=True)
            },
        },
    )


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, or None where minitron did not write it.

    Raises:
        MinitronError: the manifest is not a JSON object, or lists no files.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise MinitronError(f"{path} does not hold a JSON object; {_REMEDY}")
    if not isinstance(manifest.get("files"), dict):
        raise MinitronError(f"{path} does not list the directory's files; {_REMEDY}")
    return manifest


def verify(directory: Path) -> None:
    """Compare every file of an artifact with its manifest; a directory without one passes.

    Raises:
        MinitronError: a file is missing, has another size, or other content.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return
    files = {directory / name: entry for name, entry in manifest["files"].items()}
    for path, entry in files.items():
        if not path.exists():
            raise MinitronError(f"{path} is missing although {MANIFEST} lists it; restore the file")
        if path.stat().st_size != entry["bytes"]:
            raise MinitronError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {entry['bytes']}; "
                "the file is damaged: copy or create it again"
            )
    with ThreadPoolExecutor(max_workers=4) as pool:
        for path, digest in zip(files, pool.map(sha256, files), strict=True):
            if digest != files[path]["sha256"]:
                raise MinitronError(
                    f"{path} does not match its SHA-256 in {MANIFEST}; the file is damaged: "
                    "copy or create it again"
                )


def _versions() -> dict[str, str]:
    versions = {"python": host.python_version()}
    for package in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
