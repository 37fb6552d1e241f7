"""The layering of the package: imports point only to lower layers, and siblings of one layer do not import each other."""

import ast
from pathlib import Path

import growtrain

ROOT = Path(growtrain.__file__).parent

# From the bottom up. A name with a slash-less folder stands for every module in it.
LAYERS = [
    ["limits"],
    ["config", "allocator"],
    ["presets", "tasks", "records", "runfiles", "provenance"],
    ["commandline", "diagnostics", "networks.activations", "regularizers"],
    ["networks.heads", "networks.encoders", "networks.q_network", "environments", "replay", "optimizers", "telemetry"],
    ["networks.injected"],
    ["learners"],
    ["verdicts"],
    ["growth.adaptive", "weights"],
    ["growth.schedules", "growth.interventions", "growth.alternatives"],
    ["growth.transaction"],
    ["collection", "measuring"],
    ["evaluation", "checkpoint", "planning", "display", "doctor"],
    ["speed", "memory", "probe.settings"],
    ["plan_table"],
    ["probe.tasks", "probe.arms"],
    ["probe.cells"],
    ["probe.report"],
    ["resuming", "learning_test", "video"],
    ["rescue", "diagnosis", "training"],
    ["diagnose"],
    ["sweep.cells"],
    ["sweep.ledger", "sweep.executor", "sweep.table"],
    ["sweep.local", "sweep.ray", "sweep.driver"],
    ["analysis"],
    ["commands.running"],
    ["commands"],
    ["__main__"],
]
# Two files of one folder that may know each other: TensorBoard's tags and the like stay inside telemetry.
WITHIN = {"telemetry", "environments", "replay", "learners", "analysis"}


def layer_of(module: str) -> int:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def modules() -> dict[str, set[str]]:
    """Every module of the package and the package's modules it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name == "__init__" or name.endswith(".__init__"):
            continue
        imports: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("growtrain"):
                base = node.module.removeprefix("growtrain").removeprefix(".")
                as_modules = [".".join(filter(None, (base, alias.name))) for alias in node.names]
                imports |= {m if (ROOT / f"{m.replace('.', '/')}.py").exists() else base for m in as_modules}
            elif isinstance(node, ast.Import):
                imports |= {a.name.removeprefix("growtrain.") for a in node.names if a.name.startswith("growtrain.")}
        found[name] = imports
    return found


def test_imports_point_down() -> None:
    graph = modules()
    assert len(graph) > 20
    for module, imports in graph.items():
        for imported in imports:
            same_folder = module.split(".")[0] == imported.split(".")[0] and module.split(".")[0] in WITHIN
            assert layer_of(imported) < layer_of(module) or same_folder, f"{module} imports {imported}"


def test_the_layers_name_only_what_exists() -> None:
    existing = set(modules())
    for name in (name for names in LAYERS for name in names):
        assert any(module == name or module.startswith(f"{name}.") for module in existing), name


def test_packages_hold_no_code_and_nothing_is_called_utils() -> None:
    for path in ROOT.rglob("__init__.py"):
        if path.parent != ROOT:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), path
    assert not [name for name in modules() if any(word in name for word in ("util", "common", "helper", "misc"))]
