"""docs/reliability.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLES = (ROOT / "docs/reliability.md").read_text().split("| fault |")[1:]


def test_every_row_names_a_test_that_exists():
    rows = [row for table in TABLES for row in table.split("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5, row
        file, _, name = cells[-1].strip("` ").partition("::")
        functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert re.fullmatch(r"tests/[\w/]+\.py", file) and name in functions, cells[-1]
