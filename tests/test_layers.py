"""The layering of the package: imports point only to lower packages, and files of one package do not import each other in a circle."""

import ast
from pathlib import Path

import growtrain

ROOT = Path(growtrain.__file__).parent

# From the bottom up.
LAYERS = [
    "environments",
    "settings",
    "diagnostics",
    "records",
    "runfiles",
    "telemetry",
    "networks",
    "replay",
    "learners",
    "growth",
    "plasticity",
    "planning",
    "runs",
    "sweep",
    "analysis",
    "probe",
    "diagnosis",
    "commands",
    "__main__",
]


def modules() -> dict[str, set[str]]:
    """Every module of the package and the package's modules it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name == "__init__" or name.endswith(".__init__"):
            continue
        imports: set[str] = set()
        for node in _outside_type_checking(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "growtrain":
                base = node.module.removeprefix("growtrain").removeprefix(".")
                as_modules = [".".join(filter(None, (base, alias.name))) for alias in node.names]
                imports |= {m if (ROOT / f"{m.replace('.', '/')}.py").exists() else base for m in as_modules}
            elif isinstance(node, ast.Import):
                imports |= {a.name.removeprefix("growtrain.") for a in node.names if a.name.startswith("growtrain.")}
        found[name] = imports
    return found


def _outside_type_checking(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those that only a type checker sees."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            nodes += [child, *_outside_type_checking(child)]
    return nodes


def test_imports_point_down() -> None:
    graph = modules()
    assert len(graph) > 60
    for module, imports in graph.items():
        own = module.split(".")[0]
        assert own in LAYERS, f"{module} is in no layer: add its package to LAYERS"
        for imported in imports:
            other = imported.split(".")[0]
            assert own == other or LAYERS.index(other) < LAYERS.index(own), f"{module} imports {imported}"


def test_no_circles() -> None:
    graph, done = modules(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_layers_are_what_exists() -> None:
    existing = {module.split(".")[0] for module in modules()}
    assert set(LAYERS) == existing


def test_only_what_belongs_to_no_package_lies_at_the_root() -> None:
    loose = {path.stem for path in ROOT.glob("*.py")}
    assert loose == {"__init__", "__main__", "records", "runfiles", "diagnostics"}


def test_packages_hold_no_code_and_nothing_is_called_utils() -> None:
    for path in ROOT.rglob("__init__.py"):
        if path.parent != ROOT:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), path
    assert not [name for name in modules() if any(word in name for word in ("util", "common", "helper", "misc"))]
