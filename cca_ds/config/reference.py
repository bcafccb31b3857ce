"""Every key of a recipe with type, default, range and meaning, read off the schema: `python -m cca_ds config`."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cca_ds.config.schema import RunConfig


def config_reference() -> str:
    """Markdown: a table of the keys outside sections, then one of each section."""
    top = {name: field for name, field in RunConfig.model_fields.items() if not _section(field)}
    parts = [
        "# Configuration",
        "A recipe is a YAML file of these sections; `--set section.key=value` overrides one value. Unknown keys are "
        "errors. This page is what `python -m cca_ds config` prints.",
        _table("", top),
    ]
    for name, field in RunConfig.model_fields.items():
        if section := _section(field):
            parts += [f"## {name}", " ".join((section.__doc__ or "").split()), _table(f"{name}.", section.model_fields)]
    return "\n\n".join(parts) + "\n"


def config_lines(part: str) -> list[str]:
    """The rows of the keys whose name contains `part`, for `python -m cca_ds config beta`."""
    return [line for line in config_reference().splitlines() if line.startswith("| `") and part in line.split("|")[1]]


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in fields.items():
        kind, limits = _type(field.annotation), _limits(field)
        default = json.dumps(field.get_default(call_default_factory=True))
        rows.append(f"| `{prefix}{field.alias or name}` | {kind} | `{default}` | {limits} | {field.description} |")
    return "\n".join(rows)


def _type(kind: Any) -> str:
    """A type as a reader of YAML knows it; choices are listed."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is typing.Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is types.NoneType else _type(part) for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(part) for part in parts)}]"
    if origin is dict:
        return f"mapping to {_type(parts[1])}" if parts[1] is not Any else "mapping"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}[kind.__name__]


def _limits(field: FieldInfo) -> str:
    kinds = {
        annotated_types.Gt: ("gt", ">"),
        annotated_types.Ge: ("ge", "≥"),
        annotated_types.Lt: ("lt", "<"),
        annotated_types.Le: ("le", "≤"),
    }
    found = []
    for limit in field.metadata:
        if type(limit) in kinds:
            attribute, sign = kinds[type(limit)]
            found.append(f"{sign} {getattr(limit, attribute):g}")
    return ", ".join(found)
