"""The two sources of a recipe, YAML files and command-line flags, as one stream of assignments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minitron.config.keys import Key, show, tree_above, unknown, wrong_type
from minitron.config.typed import convert
from minitron.errors import MinitronError, saying

_WITHOUT_VALUE = ("help", "print_config")


def split_flags(argv: Sequence[str], keys: Mapping[str, Key]) -> dict[str, list[str]]:
    """The texts given for each key, keys in order of first appearance.

    Plain text for a section counts as given for its `path` key, so that both forms add up. A key
    of a list type takes all texts up to the next flag.

    Raises:
        MinitronError: a flag is unknown or lacks its value, or something is no flag.
    """
    flags: dict[str, list[str]] = {}
    rest = ["--help" if argument == "-h" else argument for argument in argv]
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise MinitronError(
                f"unexpected argument {flag}; give keys as --key value (--help lists them)"
            )
        name, has_value, text = flag[2:].partition("=")
        if name.replace("-", "_") in keys:  # as other programs write their flags
            name = name.replace("-", "_")
        if name in _WITHOUT_VALUE:
            flags[name] = []
            continue
        is_free = name not in keys and tree_above(name, keys) is not None
        if name != "config" and name not in keys and not is_free:
            raise unknown(name, keys)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif is_free or (name in keys and keys[name].type is bool):
                text = "true"
            else:
                raise MinitronError(f"--{name} has no value; give --{name} VALUE")
        if f"{name}.path" in keys and isinstance(_flow_value(keys[name], text), str):
            name = f"{name}.path"
        texts = [text]
        if (is_free or (name in keys and keys[name].is_list)) and not has_value:
            while rest and not rest[0].startswith("-"):
                texts.append(rest.pop(0))
        flags.setdefault(name, []).extend(texts)
    return flags


def assignments(
    flags: Mapping[str, Sequence[str]], keys: Mapping[str, Key]
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, typed value) from the `--config` files, then from the other flags.

    A section appears by itself with {} where it is given and with None where it is switched off.

    Raises:
        MinitronError: a file cannot be read, a key is unknown, or a value has the wrong type.
    """
    for file in flags.get("config", ()):
        with saying(file):
            yield from assignments_of(_read_yaml(Path(file)), keys)
    for name, texts in flags.items():
        if name in keys:
            yield from _typed(_flatten(_flag_value(keys[name], texts), keys, name), keys)
        elif tree_above(name, keys):
            values = [_free_value(text) for text in texts]
            value = values[0] if len(values) == 1 else values
            yield from _typed(_flatten(value, keys, name), keys)


def assignments_of(tree: Mapping[str, Any], keys: Mapping[str, Key]) -> Iterator[tuple[str, Any]]:
    """Yield what a mapping says, as `assignments` does of a file.

    Raises:
        MinitronError: a key is unknown, or a value has the wrong type.
    """
    yield from _typed(_flatten(tree, keys), keys)


class _TextLoader(yaml.SafeLoader):
    """Loads YAML with every scalar but null as text, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
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
    except OSError as error:
        raise MinitronError(
            f"cannot be read ({error.strerror}); give --config a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise MinitronError("is not UTF-8 text; give --config a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or error.context or ""
        if "'\\t'" in problem:
            problem = "a tab; indent with spaces"
        raise MinitronError(f"{where}not valid YAML, {problem}") from None
    except yaml.YAMLError as error:
        raise MinitronError(f"not valid YAML, {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MinitronError(f"holds {show(content)}; a recipe is made of `key: value` lines")
    return content


def _flag_value(key: Key, texts: Sequence[str]) -> Any:
    """What the texts given for one flag amount to, as YAML would have said it."""
    values = [_flow_value(key, text) for text in texts]
    if not key.is_list or values == [None]:
        return values[-1]
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _flow_value(key: Key, text: str) -> Any:
    """Interpret `null`, `[...]` and `{...}` where the key's type can hold them."""
    if key.nullable and text == "null":
        return None
    if key.opening is None or not text.startswith(key.opening):
        # No number holds a comma; a path may.
        return text.split(",") if key.is_list_of_numbers and "," in text else text
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError:
        raise wrong_type(key, text) from None


def _free_value(text: str) -> Any:
    """Interpret `null`, `[...]` and `{...}` where nothing is known of the key's type."""
    if text != "null" and text[:1] not in ("[", "{"):
        return text
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError:
        return text


def _flatten(value: Any, keys: Mapping[str, Key], name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, text or texts) for everything that `value` says at or below `name`."""
    if name and name not in keys:
        tree = tree_above(name, keys)
        if tree is None:
            raise unknown(name, keys)
        yield tree, {name.removeprefix(f"{tree}."): value}
    elif name and not keys[name].is_section:
        yield name, value
    elif name and keys[name].nullable and value is None:
        yield name, None
    elif value is None or isinstance(value, Mapping):
        if name:
            yield name, {}
        for field, inner in (value or {}).items():
            yield from _flatten(inner, keys, f"{name}.{field}" if name else str(field))
    elif isinstance(value, str) and f"{name}.path" in keys:
        yield f"{name}.path", value
    else:
        fields = ", ".join(k for k in keys if k.rpartition(".")[0] == name)
        raise MinitronError(f"{name}={show(value)} is not valid; {name} is a section of {fields}")


def _typed(
    assignments: Iterator[tuple[str, Any]], keys: Mapping[str, Key]
) -> Iterator[tuple[str, Any]]:
    for name, value in assignments:
        yield name, value if keys[name].is_section else convert(keys[name], value)
