"""Recipes: frozen dataclasses filled from YAML and dotted command-line keys.

A recipe is a dataclass whose fields are keys or sections (nested dataclasses); the string literal
after a field is its help text. Both sources are flattened to `section.key -> text` before anything
is interpreted: YAML scalars stay text too, so that the declared type alone decides what `1e-4`,
`no` or `010` means, and the command line and YAML cannot differ. Only this file knows the library
(jsonargparse) that converts text to the declared types and lays out `--help`.

Relative paths, also those in a YAML file, are relative to the current directory.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import itertools
import os
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse
import yaml

from minitron.errors import MinitronError

Recipe = TypeVar("Recipe")

_USAGE = "%(prog)s [--config RECIPE.yaml] [--key value ...]"


def parse(recipe_class: type[Recipe], argv: Sequence[str] | None = None) -> Recipe:
    """Build a recipe from `--config FILE` and dotted keys, which win wherever they stand.

    `--help` and `--print_config` print on rank 0 and end the process with status 0. A repeated key
    of a list type accumulates; a bare key of type bool means true; a plain value for a section that
    has a `path` key sets that key; `null` switches an optional section off.

    Args:
        recipe_class: a dataclass; its sections are dataclasses too.
        argv: the arguments; those of the process if None.

    Raises:
        MinitronError: a key is unknown, missing or of the wrong type, a file cannot be read, or a
            section's own check failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _keys(recipe_class)
    parser = _parser(recipe_class, keys)
    flags = _split(argv, keys)
    if "help" in flags:
        _print_and_exit(parser.format_help())
    given: dict[str, Any] = {}
    for file in flags.pop("config", []):
        with _prefixed(file):
            for name, value in _flatten(_read_yaml(Path(file)), keys):
                _assign(given, keys, name, _convert(parser, keys, name, value))
    print_config = flags.pop("print_config", None)
    for name, values in flags.items():
        for leaf, value in _flatten(_flag_value(keys, name, values), keys, name):
            _assign(given, keys, leaf, _convert(parser, keys, leaf, value))
    recipe = _build(recipe_class, "", keys, _resolve(keys, given))
    if print_config is not None:
        _print_and_exit(_to_yaml(recipe))
    return recipe


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe, or a section, as plain values that JSON and YAML hold, in field order."""
    return {
        field.name: _plain(getattr(recipe, field.name))
        for field in dataclasses.fields(recipe)
        if field.init
    }


def save(recipe: Any, path: Path) -> None:
    """Write the resolved recipe as YAML; `parse` with `--config path` gives it back."""
    path.write_text(_to_yaml(recipe))


def launch_rank() -> int:
    """The rank that torchrun gave this process, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


@dataclasses.dataclass(frozen=True)
class _Key:
    """One key or section of a recipe; `type` is the declared type without `| None`."""

    name: str
    type: Any
    nullable: bool
    default: Any
    owner: type

    @property
    def is_section(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    @property
    def is_list(self) -> bool:
        origin, args = typing.get_origin(self.type), typing.get_args(self.type)
        return self.type in (list, tuple) or origin is list or (origin is tuple and ... in args)

    @property
    def field(self) -> str:
        return self.name.rpartition(".")[2]


def _keys(cls: Any, prefix: str = "", instance: Any = None) -> dict[str, _Key]:
    """Every key below `cls` by its dotted name, in field order, a section before its keys."""
    keys: dict[str, _Key] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default(field) if instance is None else getattr(instance, field.name)
        inner, nullable = _without_none(hints[field.name])
        key = _Key(prefix + field.name, inner, nullable, default, cls)
        keys[key.name] = key
        if key.is_section:
            section = default if dataclasses.is_dataclass(default) else None
            keys |= _keys(key.type, f"{key.name}.", section)
    return keys


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and whether None was there."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) not in (typing.Union, types.UnionType) or type(None) not in args:
        return hint, False
    return typing.Union[tuple(a for a in args if a is not type(None))], True  # noqa: UP007


# Reading the two sources.


class _TextLoader(yaml.SafeLoader):
    """Loads YAML with every scalar but null as text, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping after checking that its keys differ."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise MinitronError(f"cannot be read ({reason}); give --config a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise MinitronError(f"{line}not valid YAML, {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise MinitronError(f"not valid YAML, {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise MinitronError(f"holds {_show(content)}; a recipe is made of `key: value` lines")
    return content or {}


def _split(argv: Sequence[str], keys: Mapping[str, _Key]) -> dict[str, list[str]]:
    """Collect the values of every flag in order of first appearance."""
    flags: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if flag == "-h":
            flag = "--help"
        if not flag.startswith("--") or flag == "--":
            raise MinitronError(
                f"unexpected argument {flag}; give keys as --key value (see --help for their names)"
            )
        name, has_value, value = flag[2:].partition("=")
        values = flags.setdefault(name, [])
        if name in ("help", "print_config"):
            continue
        if name != "config" and name not in keys:
            raise _unknown(name, keys)
        if has_value:
            values.append(value)
        elif rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        elif name in keys and keys[name].type is bool:
            values.append("true")
        else:
            raise MinitronError(f"--{name} needs a value")
    return flags


def _flag_value(keys: Mapping[str, _Key], name: str, values: list[str]) -> Any:
    """What the texts given for one flag amount to, as YAML would have said it."""
    key = keys[name]
    loaded = [_load_flow(key, text) for text in values]
    if key.is_list and loaded != [None]:
        return [v for value in loaded for v in (value if isinstance(value, list) else [value])]
    return loaded[-1]


def _load_flow(key: _Key, text: str) -> Any:
    """Interpret `[...]`, `{...}` and `null` where the key's type can hold them."""
    opening = "{" if key.is_section or typing.get_origin(key.type) is dict else "["
    is_text = not key.is_section and typing.get_origin(key.type) in (None, Literal)
    if text == "null" and key.nullable:
        return None
    if is_text or not text.startswith(opening):
        return text
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError:
        raise _wrong_type(key, text) from None


def _flatten(value: Any, keys: Mapping[str, _Key], name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each (dotted name, value) below `name`; a section by itself as {} (on) or None."""
    key = keys.get(name)
    if name and key is None:
        raise _unknown(name, keys)
    if key is not None and not key.is_section:
        yield name, value
    elif value is None and key is not None and key.nullable:
        yield name, None
    elif value is None or isinstance(value, dict):
        if key is not None:
            yield name, {}
        for field, inner in (value or {}).items():
            yield from _flatten(inner, keys, f"{name}.{field}" if name else str(field))
    elif isinstance(value, str) and f"{name}.path" in keys:
        yield f"{name}.path", value
    else:
        fields = ", ".join(k for k in keys if k.rpartition(".")[0] == name)
        raise MinitronError(
            f"{name}={_show(value)} is not valid; {name} is a section: give {fields}"
        )


def _assign(given: dict[str, Any], keys: Mapping[str, _Key], name: str, value: Any) -> None:
    """Record a value; switching a section off or on forgets what was said of it before."""
    if keys[name].is_section and value is None:
        for below in [n for n in given if n.startswith(f"{name}.")]:
            del given[below]
    for section in _parents(name):
        given[section] = {}
    given[name] = value


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


# From texts to values.


def _convert(
    parser: jsonargparse.ArgumentParser, keys: Mapping[str, _Key], name: str, value: Any
) -> Any:
    key = keys[name]
    if key.is_section:
        return value
    if value is None:
        if key.nullable:
            return None
        raise _wrong_type(key, None)
    if key.is_list and not isinstance(value, list):
        value = [value]
    try:
        return parser.parse_object({name: value}, defaults=False)[name]
    except (jsonargparse.ArgumentError, TypeError):
        raise _wrong_type(key, value) from None


def _resolve(keys: Mapping[str, _Key], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value: given or default; keys of a section that is off are left out."""
    values: dict[str, Any] = {}
    missing = []
    for name, key in keys.items():
        if any(values[section] is None for section in _parents(name) if section in values):
            continue
        value = given.get(name, key.default)
        if key.is_section:
            values[name] = None if value is None else {}
        elif value is dataclasses.MISSING:
            missing.append(f"--{name}")
        else:
            values[name] = value
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MinitronError(
            f"{' and '.join(missing)} {verb} missing; give {'it' if verb == 'is' else 'them'} "
            "on the command line or in the --config file"
        )
    return values


def _build(
    cls: type[Recipe], prefix: str, keys: Mapping[str, _Key], values: Mapping[str, Any]
) -> Recipe:
    arguments = {}
    for name, key in keys.items():
        if name != prefix + key.field:
            continue
        value = values[name]
        if key.is_section and value is not None:
            value = _build(key.type, f"{name}.", keys, values)
        arguments[key.field] = value
    return cls(**arguments)


# Errors and plain words.


@contextlib.contextmanager
def _prefixed(file: str) -> Iterator[None]:
    try:
        yield
    except MinitronError as error:
        raise MinitronError(f"{file}: {error}") from None


def _unknown(name: str, keys: Mapping[str, _Key]) -> MinitronError:
    def similarity(candidate: str) -> float:
        """Compare in full, and by as many last parts as `name` has, for a forgotten section."""
        tail = ".".join(candidate.split(".")[-len(name.split(".")) :])
        ratios = [difflib.SequenceMatcher(None, name, c).ratio() for c in (candidate, tail)]
        return max(ratios[0], 0.95 * ratios[1])

    return MinitronError(f"unknown key {name}; did you mean {max(keys, key=similarity)}?")


def _wrong_type(key: _Key, value: Any) -> MinitronError:
    expected = _words(key.type) + (" or null" if key.nullable else "")
    return MinitronError(f"{key.name}={_show(value)} is not valid; expected {expected}")


def _show(value: Any) -> str:
    """A value on one line, much as the user would write it in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_show(k)}: {_show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_show, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return " ".join(str(value).split()) or "''"


def _words(hint: Any, plural: bool = False) -> str:
    """A type in plain words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    simple = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
        str: ("text", "texts"),
        Path: ("a path", "paths"),
        Any: ("anything", "anything"),
    }
    if hint in simple:
        return simple[hint][plural]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list or (origin is tuple and ... in args):
        return f"{'lists' if plural else 'a list'} of {_words(args[0], plural=True)}"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(_words(a) for a in args)
    if origin is dict:
        return f"a mapping of {_words(args[0], True)} to {_words(args[1], True)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a, plural) for a in args)
    return getattr(hint, "__name__", str(hint))


# Help and output.


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Shows each key's help as composed here, without the library's own type and default."""

    def _get_help_string(self, action: Any) -> str:
        return action.help


def _parser(recipe_class: type, keys: Mapping[str, _Key]) -> jsonargparse.ArgumentParser:
    """The library's parser: one typed argument a key, one group a section."""
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage=_USAGE,
        description=_class_doc(recipe_class),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--help", action="store_true", help="Show this text and exit.")
    general.add_argument("--config", metavar="YAML", help="Recipe file; other flags win over it.")
    general.add_argument(
        "--print_config", action="store_true", help="Print the resolved recipe and exit."
    )
    groups: dict[str, Any] = {"": parser.add_argument_group("recipe")}
    docs: dict[type, dict[str, str]] = {}
    for name, key in keys.items():
        doc = docs.setdefault(key.owner, _field_docs(key.owner)).get(key.field, "")
        if key.is_section:
            notes = [doc or _class_doc(key.type)]
            if key.nullable:
                notes.append(f"Optional: {'off' if key.default is None else 'on'} by default.")
            if f"{name}.path" in keys:
                notes.append(f"`--{name} X` is short for `--{name}.path X`.")
            groups[name] = parser.add_argument_group(name, " ".join(filter(None, notes)))
            continue
        action = groups[name.rpartition(".")[0]].add_argument(
            f"--{name}",
            type=key.type,
            metavar=_metavar(key.type),
            help=f"{doc} ({_note(key)})".strip(),
        )
        action.option_strings = [f"--{name}"]  # without the library's `--list+` spelling
    return parser


def _note(key: _Key) -> str:
    notes = [_words(key.type) + (" or null" if key.nullable else "")]
    if key.is_list:
        notes.append("repeatable")
    if key.default is dataclasses.MISSING:
        notes.append("required")
    else:
        notes.append(f"default: {_show(_plain(key.default))}")
    return "; ".join(notes)


def _metavar(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (list, tuple):
        return _metavar(args[0])
    return {str: "TEXT", bool: "[BOOL]"}.get(hint, getattr(hint, "__name__", "VALUE").upper())


def _class_doc(cls: type) -> str:
    doc = cls.__doc__ or ""
    generated = doc.startswith(f"{cls.__name__}(")  # what @dataclass writes where there is none
    return "" if generated else inspect.cleandoc(doc).split("\n\n")[0].replace("\n", " ")


def _field_docs(cls: type) -> dict[str, str]:
    """The string literal after each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match doc:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[field.target.id] = " ".join(text.split())
    return docs


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _to_yaml(recipe: Any) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def _print_and_exit(text: str) -> NoReturn:
    if launch_rank() == 0:
        print(text, end="", flush=True)
    raise SystemExit(0)
