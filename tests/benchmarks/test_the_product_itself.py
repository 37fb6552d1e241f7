"""Benchmarks measure the product: they take the run's own step, and rewrite nothing of it."""

import ast
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_has_no_loop_of_its_own_and_rewrites_no_constant(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "receive" not in called  # with which a loop takes the step of the environments in
    stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert not [name for name in stored if name.isupper()]


def test_all_scripts_are_read() -> None:
    assert {"throughput", "wallclock_cells", "run_wallclock"} <= {path.stem for path in SCRIPTS}
