"""Text to values of the declared types, and `--help`: all that needs jsonargparse."""

from __future__ import annotations

import copy
import sys
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from minitron.config.keys import (
    Key,
    Tree,
    class_doc,
    expected,
    field_docs,
    plain,
    show,
    wrong_type,
)


def convert(key: Key, value: Any) -> Any:
    """Turn text, or lists and mappings of texts, into the key's type.

    Raises:
        MinitronError: the value does not fit.
    """
    if value is None:
        if key.nullable:
            return None
        raise wrong_type(key, value)
    if key.type == Tree:
        if isinstance(value, dict):
            return value
        raise wrong_type(key, value)
    if key.is_list and not isinstance(value, list):
        value = [value]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=key.type)
    try:
        return parser.parse_object({"value": copy.deepcopy(value)}).value  # it edits lists
    except (jsonargparse.ArgumentError, TypeError):
        raise wrong_type(key, value) from None


def help_text(recipe_class: type, keys: Mapping[str, Key]) -> str:
    """What `--help` prints: every key, grouped by section, with its meaning, type and default."""
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage="%(prog)s [--config RECIPE.yaml] [--key value ...]",
        description=class_doc(recipe_class),
        formatter_class=_HelpFormatter,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--help", action="store_true", help="Print this text and exit.")
    general.add_argument(
        "--config", metavar="YAML", help="Recipe file; later files win, the other flags over all."
    )
    general.add_argument(
        "--print_config", action="store_true", help="Print the resolved recipe as YAML and exit."
    )
    groups = {"": parser.add_argument_group("recipe")}
    for name, key in keys.items():
        doc = field_docs(key.owner).get(key.field, "")
        if key.is_section:
            groups[name] = parser.add_argument_group(name, _section_note(key, keys, doc))
            continue
        action = groups[name.rpartition(".")[0]].add_argument(
            f"--{name}", type=key.type, metavar=_metavar(key.type), help=f"{doc} ({_note(key)})"
        )
        action.option_strings = [f"--{name}"]  # without jsonargparse's `--list+`
    return parser.format_help()


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Takes each key's help as composed here, without jsonargparse's own type and default."""

    def _get_help_string(self, action: Any) -> str:
        return action.help


def _section_note(key: Key, keys: Mapping[str, Key], doc: str) -> str:
    notes = [doc or class_doc(key.type)]
    if key.nullable and key.default is None:
        notes.append("Off unless one of its keys is given.")
    elif key.nullable:
        notes.append(f"`--{key.name} null` switches it off.")
    if f"{key.name}.path" in keys:
        notes.append(f"`--{key.name} X` is short for `--{key.name}.path X`.")
    return " ".join(filter(None, notes))


def _note(key: Key) -> str:
    repeatable = "; repeatable" if key.is_list else ""
    default = "required" if key.default is MISSING else f"default: {show(plain(key.default))}"
    return f"{expected(key)}{repeatable}; {default}"


def _metavar(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (list, tuple):
        return _metavar(args[0])
    if origin is not None:
        return "VALUE"
    return {str: "TEXT", bool: "[BOOL]"}.get(hint, getattr(hint, "__name__", "VALUE").upper())
