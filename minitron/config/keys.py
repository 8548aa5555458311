"""A recipe class as a flat table of dotted keys, and the words in which users hear of them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from minitron.errors import MinitronError

Tree = dict[str, Any]
"""The type of a key that takes any mapping as it stands in YAML, scalars as text: keys of another
recipe, for `config.build` to interpret."""


_SIMILAR = 0.6  # of 1; below, what looks alike means something else


@dataclasses.dataclass(frozen=True)
class Key:
    """One key or section of a recipe.

    Attributes:
        name: dotted name.
        type: the declared type without `| None`.
        nullable: whether `| None` was there.
        default: the default, `dataclasses.MISSING` where the key is required.
        owner: the dataclass that declares it.
    """

    name: str
    type: Any
    nullable: bool
    default: Any
    owner: type

    @property
    def field(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def is_section(self) -> bool:
        """Whether the key holds other keys."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_list(self) -> bool:
        """Whether the key holds any number of values."""
        return _is_list(self.type)

    @property
    def is_list_of_numbers(self) -> bool:
        """Whether those values are integers or floats."""
        return self.is_list and typing.get_args(self.type)[0] in (int, float)

    @property
    def opening(self) -> str | None:
        """The bracket that opens a value of this type in YAML's one-line style, if it has one."""
        if self.is_section or typing.get_origin(self.type) is dict:
            return "{"
        return "[" if typing.get_origin(self.type) in (list, tuple) else None


def keys_of(cls: Any, prefix: str = "", instance: Any = None) -> dict[str, Key]:
    """Every key below `cls` by its dotted name, in field order, a section before its keys.

    Args:
        cls: a recipe class or section.
        prefix: what precedes the field's name, dot included.
        instance: the section that a recipe has by default; its values are the keys' defaults.
    """
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default(field) if instance is None else getattr(instance, field.name)
        inner, nullable = _without_none(hints[field.name])
        key = Key(prefix + field.name, inner, nullable, default, cls)
        keys[key.name] = key
        if key.is_section:
            section = default if dataclasses.is_dataclass(default) else None
            keys |= keys_of(key.type, f"{key.name}.", section)
    return keys


def parents(name: str) -> Iterator[str]:
    """The sections that hold a key, innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def tree_above(name: str, keys: Mapping[str, Key]) -> str | None:
    """The key of type `Tree` that takes what is given by this name, if there is one."""
    return next((key for key in parents(name) if key in keys and keys[key].type == Tree), None)


def unknown(name: str, keys: Mapping[str, Key]) -> MinitronError:
    """The error for a key that does not exist, with the nearest one that does, if any is near."""

    def similarity(candidate: str) -> float:
        """Compare in full, and with as many last parts as `name` has (a forgotten section)."""
        tail = ".".join(candidate.split(".")[-len(name.split(".")) :])
        whole, part = (difflib.SequenceMatcher(None, name, c).ratio() for c in (candidate, tail))
        return max(whole, 0.95 * part)

    nearest = max(keys, key=similarity)
    if similarity(nearest) >= _SIMILAR:
        return MinitronError(f"unknown key {name}; did you mean {nearest}?")
    top = ", ".join(key for key in keys if "." not in key)
    return MinitronError(f"unknown key {name}; there are {top} (--help explains them)")


def wrong_type(key: Key, value: Any) -> MinitronError:
    """The error for a value that does not fit its key."""
    return MinitronError(f"{key.name}={show(value)} is not valid; expected {expected(key)}")


def expected(key: Key) -> str:
    """What a key takes, in plain words."""
    return _words(key.type) + (" or null" if key.nullable else "")


def show(value: Any) -> str:
    """A value on one line, much as a user would write it in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(str(value).split()) or "''"


def plain(value: Any) -> Any:
    """A value in the types that JSON and YAML have."""
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def class_doc(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # what @dataclass writes where there is none
        return ""
    return inspect.cleandoc(doc).split("\n\n")[0].replace("\n", " ")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string literal after each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for pair in itertools.pairwise(body):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and whether None was there."""
    args = typing.get_args(hint)
    if not _is_union(hint) or type(None) not in args:
        return hint, False
    return typing.Union[tuple(arg for arg in args if arg is not type(None))], True  # noqa: UP007


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return origin is list or (origin is tuple and ... in typing.get_args(hint))


def _words(hint: Any, *, plural: bool = False) -> str:
    """A type in plain words."""
    simple = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
        str: ("text", "texts"),
        Path: ("a path", "paths"),
    }
    if hint in simple:
        return simple[hint][plural]
    if hint == Tree:
        return "a mapping of keys"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if _is_union(hint):
        return " or ".join(_words(arg, plural=plural) for arg in args)
    if _is_list(hint):
        return f"{'lists' if plural else 'a list'} of {_words(args[0], plural=True)}"
    if origin is tuple:
        return "a list of " + " and ".join(_words(arg) for arg in args)
    if origin is dict:
        return f"a mapping of {_words(args[0], plural=True)} to {_words(args[1], plural=True)}"
    return "a mapping of its keys" if dataclasses.is_dataclass(hint) else str(hint)
