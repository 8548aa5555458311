"""Recipes: frozen dataclasses filled from YAML and dotted command-line keys.

A recipe is a dataclass whose fields are keys or sections (nested dataclasses); the string literal
after a field is its help text. Both sources are flattened to `section.key -> text` before anything
is interpreted (`sources.py`): YAML scalars stay text too, so that the declared type alone decides
what `1e-4`, `no` or `null` means, and the command line and YAML cannot differ. `keys.py` describes
a recipe class, `typed.py` turns text into values of the declared types and writes `--help`.

Relative paths, also those in a YAML file, are relative to the current directory.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from minitron.config import sources, typed
from minitron.config.keys import Key, Tree, keys_of, parents, plain
from minitron.errors import MinitronError
from minitron.metrics import launch_rank

__all__ = ["Tree", "build", "check_paths", "parse", "save", "to_dict"]

Recipe = TypeVar("Recipe")


def parse(recipe_class: type[Recipe], argv: Sequence[str] | None = None) -> Recipe:
    """Build a recipe from `--config FILE` and dotted keys, which win wherever they stand.

    Of several files the later ones win. `--help` and `--print_config` print on rank 0 and end the
    process with status 0. A key of a list type takes several values and accumulates if repeated; a
    bare key of type bool means true; a plain value for a section that has a `path` key sets that
    key; `null` switches an optional section off.

    Args:
        recipe_class: a dataclass; its sections are dataclasses too.
        argv: the arguments; those of the process if None.

    Raises:
        MinitronError: a key is unknown, missing or of the wrong type, a file cannot be read, or a
            section's own check failed.
    """
    keys = keys_of(recipe_class)
    flags = sources.split_flags(sys.argv[1:] if argv is None else argv, keys)
    if "help" in flags:
        _print_and_exit(typed.help_text(recipe_class, keys))
    recipe = _interpret(recipe_class, keys, sources.assignments(flags, keys))
    if "print_config" in flags:
        _print_and_exit(_to_yaml(recipe))
    return recipe


def check_paths(recipe: Any, prefix: str = "") -> None:
    """Refuse a recipe that names what is not there; every path but `out` is read.

    Raises:
        MinitronError: with the first such path.
    """
    for field in dataclasses.fields(recipe):
        value, name = getattr(recipe, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_paths(value, f"{name}.")
        elif isinstance(value, Path) and name != "out" and not value.exists():
            where = "" if value.is_absolute() else f" in {Path.cwd()}"
            raise MinitronError(f"--{name} {value} does not exist{where}; correct the path")


def build(recipe_class: type[Recipe], *trees: Mapping[str, Any]) -> Recipe:
    """Build a recipe from mappings such as a key of type `Tree` holds, of which later ones win.

    Args:
        recipe_class: as for `parse`.
        trees: nested or with dotted names, values as text or as what they are.

    Raises:
        MinitronError: as `parse` does.
    """
    keys = keys_of(recipe_class)
    given = (assignment for tree in trees for assignment in sources.assignments_of(tree, keys))
    return _interpret(recipe_class, keys, given)


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe, or a section, as plain values that JSON and YAML hold, in field order."""
    return plain(recipe)


def save(recipe: Any, path: Path) -> None:
    """Write the resolved recipe as YAML; `parse` with `--config path` gives it back."""
    path.write_text(_to_yaml(recipe), encoding="utf-8")


def _interpret(
    recipe_class: type[Recipe], keys: Mapping[str, Key], assignments: Iterable[tuple[str, Any]]
) -> Recipe:
    given: dict[str, Any] = {}
    for name, value in assignments:
        _assign(given, keys[name], value)
    return _build(recipe_class, "", keys, _resolve(keys, given))


def _assign(given: dict[str, Any], key: Key, value: Any) -> None:
    """Record a value: switching a section off drops its keys, giving a key switches it on."""
    if key.is_section and value is None:
        for below in [name for name in given if name.startswith(f"{key.name}.")]:
            del given[below]
    for section in parents(key.name):
        given[section] = {}
    if key.type == Tree and value is not None:
        value = _merged(given.get(key.name) or {}, value)
    given[key.name] = value


def _merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> Tree:
    """A tree with another's keys over its own; a dotted name goes where its first parts are."""
    merged = dict(tree)
    for name, value in more.items():
        place = next((part for part in (name, *parents(name)) if part in merged), name)
        inner = merged.get(place)
        if place != name:
            value, inner = {name.removeprefix(f"{place}."): value}, inner or {}
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _merged(inner, value)
        merged[place] = value
    return merged


def _resolve(keys: Mapping[str, Key], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value, given or default; a section that is off is None without keys."""
    values: dict[str, Any] = {}
    missing = []
    for name, key in keys.items():
        if any(values.get(section, {}) is None for section in parents(name)):
            continue
        value = given.get(name, key.default)
        if value is not dataclasses.MISSING or key.is_section:
            values[name] = value
        else:
            missing.append(f"--{name}")
    if missing:
        raise MinitronError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give "
            f"{'it' if len(missing) == 1 else 'them'} on the command line or in the --config file"
        )
    return values


def _build(
    cls: type[Recipe], prefix: str, keys: Mapping[str, Key], values: Mapping[str, Any]
) -> Recipe:
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        name = prefix + field.name
        arguments[field.name] = values[name]
        if keys[name].is_section and values[name] is not None:
            arguments[field.name] = _build(keys[name].type, f"{name}.", keys, values)
    return cls(**arguments)


def _to_yaml(recipe: Any) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def _print_and_exit(text: str) -> NoReturn:
    if launch_rank() == 0:
        print(text, end="", flush=True)
    raise SystemExit(0)
