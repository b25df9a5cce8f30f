"""Imports run one way: a module knows what lies below it, never what lies above."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrpretrain"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Part of the package (the name after `lrpretrain`): its height. "" is the package itself.
HEIGHTS = {
    "": 0,
    "errors": 0,
    "config": 0,
    "optim": 1,
    "sharding": 1,
    "engine": 2,
    "model": 2,
    "data": 2,
    "artifacts": 2,
    "train": 3,
    "pretrain": 4,
    "finetune": 5,
    "bench": 4,
    "compare": 4,
    "report": 4,
    "doctor": 4,
    "cli": 4,
    "authors": 5,
}


def imports(module, *, nested=True):
    """Yield the full name of everything that a module imports, in functions too unless `nested` is false."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else outside_functions(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, which this test does not resolve"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside_functions(node):
    """Yield the nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def part(module):
    """Return the part of the package that a module belongs to."""
    return [*module.split("."), ""][1]


def own_imports(module):
    """Return the modules of the package that a module imports, in full."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imports(module)}
    return {name for name in found if name in MODULES}


def test_every_part_has_a_height():
    assert {part(module) for module in MODULES} == set(HEIGHTS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    above = {name for name in own_imports(module) if HEIGHTS[part(name)] > HEIGHTS[part(module)]}
    assert not above


def test_the_parts_form_no_circle():
    graph = {name: set() for name in HEIGHTS}
    for module in MODULES:
        graph[part(module)] |= {part(name) for name in own_imports(module)} - {part(module)}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("sharding") < order.index("optim")
    assert "optim" not in graph["sharding"]


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "data"])
def test_data_knows_no_model_and_no_optimizer(module):
    allowed = {"lrpretrain.errors", "lrpretrain.config", "lrpretrain.sharding.procs"}
    assert {name for name in own_imports(module) if part(name) != "data"} <= allowed


RULES = [m for m in MODULES if m.startswith("lrpretrain.optim.") and m != "lrpretrain.optim.optimizer"]


@pytest.mark.parametrize("module", RULES)
def test_rules_never_communicate(module):
    """They read like their papers: collectives live in the algebra, and one in the optimizer around them."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    uses = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "torch.distributed" not in uses
    assert not any(name.startswith("torch.distributed") for name in imports(module))


def test_deepspeed_is_imported_where_it_is_used():
    at_import = [m for m in MODULES for name in imports(m, nested=False) if name.split(".")[0] == "deepspeed"]
    assert at_import == []


def test_no_module_is_a_drawer():
    assert not {m for m in MODULES if m.rpartition(".")[2] in ("utils", "util", "helpers", "common", "misc")}
