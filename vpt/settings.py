"""Settings as text: YAML files, and `key=value` overrides read by the types of their keys."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from vpt.errors import InputError, nearest

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> Any:
    """A YAML mapping as an OmegaConf node.

    Raises:
        InputError: the file is missing, or is not a YAML mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader) or {}
        if not isinstance(values, dict):
            raise InputError(f"{path}: not a mapping of keys to values")
        return OmegaConf.create(values)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which yes, 007, 1_000 and 2024-01-31 are texts, and no key comes twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(
                None, None, "a key comes twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_NUMBER = r"[-+]?(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|True|false|False", list("tTfF")),
    ("int", _NUMBER, list("-+0123456789")),
    (
        "float",
        rf"{_NUMBER}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` or another reader of YAML would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: resolvers + _Loader.yaml_implicit_resolvers.get(first, [])
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def to_text(values: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def apply_overrides(
    model: type[BaseModel], settings: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """`settings` of a `model` with `key=value`s put over them.

    Values of keys that are texts or paths are taken as they are written, but for `null`, which is
    none; texts in a list, and keys in a mapping, too. Others are YAML.

    Raises:
        InputError: an override that is not key=value.
    """
    return merge(settings, changes_of(model, overrides))


def override(key: str, value: Sequence[Any]) -> str:
    """`key=value` as a shell takes it, of a list."""
    plain = re.compile(r"\w(?:[\w .+-]*\w)?")
    items = (str(item) if not isinstance(item, str) or plain.fullmatch(item) else _quoted(item)
             for item in value)  # fmt: skip
    text = f"{key}=[{','.join(items)}]"
    return text if re.fullmatch(r"[\w.=,+\[\]-]+", text) else shlex.quote(text)


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()


def changes_of(model: type[BaseModel], overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as a mapping like a file's.

    Raises:
        InputError: an override that is not key=value, or is below another's value.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"{item!r}: not key=value, such as data.shots=16")
        *sections, last = key.split(".")
        below = changes
        for name in sections:
            below = below.setdefault(name, {})
            if not isinstance(below, dict):
                raise InputError(f"{item!r}: {name} is a value already: drop one of them")
        try:
            below[last] = _value(_kinds_at(model, [*sections, last]), text)
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{item}: not YAML ({reason}): put texts in quotes") from None
    return changes


def merge(*nodes: Any) -> dict[str, Any]:
    """Mappings put over each other, section by section."""
    merged: dict[str, Any] = {}
    for node in nodes:
        values = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        for key, value in values.items():
            below = merged.get(key)
            both = isinstance(below, dict) and isinstance(value, dict)
            merged[key] = merge(below, value) if both else value
    return merged


def _value(kinds: list[Any], text: str) -> Any:
    """The value that `text` is for a key of these types, none where they are not known."""
    types = [kind for kind in kinds if kind is not NoneType]
    if len(types) < len(kinds) and text in {"", "null"}:
        return None
    if types and all(kind in {str, Path} for kind in types):
        return text
    if any(get_origin(kind) in {list, dict} and _holds_texts(kind) for kind in types):
        plain = re.fullmatch(r"\[([^][{}\"']+)\]", text)  # patterns such as *.bmp are no YAML
        items = [item.strip() for item in plain[1].split(",")] if plain else []
        if items and all(items):
            return items
        return yaml.load(text, yaml.BaseLoader) if text.startswith(("[", "{")) else text
    value = yaml.load(text, _Loader)
    return text if isinstance(value, str) and not text.startswith(("'", '"')) else value


def _holds_texts(kind: Any) -> bool:
    return set(_kinds(get_args(kind)[0])) <= {str, Path}


def _kinds_at(model: type[BaseModel], keys: list[str]) -> list[Any]:
    """Types of a key's value; empty where it is not known, as for a method's own options."""
    kinds: list[Any] = [model]
    for key in keys:
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        fields = sections[0].model_fields if sections else {}
        values = [k for kind in kinds if get_origin(kind) is dict for k in get_args(kind)[1:]]
        kinds = [k for kind in values for k in _kinds(kind)]
        if key in fields:
            kinds = _kinds(fields[key].annotation)
    return kinds


def _kinds(annotation: Any) -> list[Any]:
    """The types that a union has, without what is annotated to them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType}:
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def validate(model: type[Model], values: Any, where: str) -> Model:
    """`model(**values)`, with pydantic's errors said in one line each key; `where` names the file.

    Raises:
        InputError: an unknown key (with the nearest valid one), a wrong type, a value out of range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            section, dot, last = key.rpartition(".")
            fields = _fields_at(model, first["loc"][:-1])
            hint = nearest(last, fields, before=section + dot)
            raise InputError(f"{where}: unknown key {key!r}{hint}") from None
        if first["type"] == "missing":
            raise InputError(f"{where}: {key} is missing: give {key}=VALUE") from None
        value, message = first["input"], first["msg"].lower()
        if first["type"] in {"list_type", "tuple_type"} and isinstance(value, str | int | float):
            message = f"not a list: give {override(key, [value])}"
        if first["type"] == "model_type":
            fields = _fields_at(model, first["loc"])
            message = f"not a section: give {key}.KEY=VALUE, keys {', '.join(fields)}"
        raise InputError(f"{where}: {key}={value!r}: {message}") from None


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if part not in model.model_fields:  # a task
            continue
        annotation = model.model_fields[part].annotation
        model = next((t for t in (annotation, *get_args(annotation)) if isinstance(t, type)), model)
    return list(model.model_fields)
