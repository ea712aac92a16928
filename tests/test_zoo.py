"""Every module of the zoo folds right or is refused in one line, and nothing else."""

from pathlib import Path

import pytest
from zoo import CASES
from zoo.judge import judge

TABLE = Path(__file__).parents[1] / "docs" / "folding_zoo.md"


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        pytest.param(name, kind, dtype, id=f"{name}-{kind}-{str(dtype).removeprefix('torch.')}")
        for name, case in CASES.items()
        for kind, dtype in case.trials()
    ],
)
def test_a_module_gets_its_verdict(name, kind, dtype):
    judge(CASES[name], kind, dtype)


def test_the_table_has_every_module():
    assert TABLE.exists(), "run tools/zoo_table.py"
    rows = [line.split("|")[1].strip().strip("`") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert rows == list(CASES)
