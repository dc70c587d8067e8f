"""The committed JSON Schemas are those of the models."""

from pathlib import Path

import pytest

from handheld import schemas

FOLDER = Path(__file__).parents[2] / "schemas"


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_committed_schema_is_current(name: str) -> None:
    committed = (FOLDER / f"{name}.schema.json").read_text()
    assert committed == schemas.schema(name), "type: python -m handheld.schemas"


def test_no_schema_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.schema.json" for name in schemas.SCHEMAS}
