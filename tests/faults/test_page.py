"""docs/reliability.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]


def test_every_row_names_a_test_that_exists():
    rows = [row for row in ROWS if not row.startswith("| fault |")]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5, row
        file, _, name = cells[-1].strip("` ").partition("::")
        functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert re.fullmatch(r"tests/[\w/]+\.py", file) and name in functions, cells[-1]
