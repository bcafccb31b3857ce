"""docs/config.md is the schema's own description, and every key has one."""

from pathlib import Path

from pydantic import BaseModel

from cca_ds.config.reference import config_lines, config_reference
from cca_ds.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_schema():
    assert (ROOT / "docs" / "config.md").read_text() == config_reference(), "python -m cca_ds config > docs/config.md"


def test_every_key_has_a_meaning_and_stands_in_the_page():
    def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += keys(field.annotation, f"{name}.")
            else:
                assert field.description, f"{prefix}{name}"
                found.append(f"{prefix}{field.alias or name}")
        return found

    rows = config_lines("")
    assert [row.split("`")[1] for row in rows] == sorted(keys(RunConfig), key=lambda key: "." in key)


def test_type_default_and_range():
    (row,) = config_lines("loss.condition_mask_probability")
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["number", "`0.1`", "≥ 0, < 1"]
    (row,) = config_lines("guidance_interval")
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["[whole number, whole number] or null", "`null`"]
