"""The plan of the house: which room may know of which, read from the sources."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from packaging.requirements import Requirement

import taperlit

ROOT = Path(taperlit.__file__).parent
FILES = {
    ".".join(("taperlit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
OUTER = ("taperlit", "__main__", "bench", "callbacks", "checkpoint", "cli", "data", "distributed", "report", "training")
INNER = [name for name in FILES if name.removeprefix("taperlit.").split(".")[0] not in OUTER]
OUTSIDE = ("lightning", "pytorch_lightning", "lightning_fabric", "torch.distributed")
COMPAT = "taperlit.training.lightning_compat"


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def names_imported(name: str) -> Iterator[str]:
    """Every dotted name that a module imports, at its top or within a function."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, which these tests do not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(dotted: str) -> str | None:
    """The module of ours that an imported name comes from."""
    package, _, leaf = dotted.rpartition(".")
    if package == "taperlit" and leaf in taperlit._HOMES:
        return taperlit._HOMES[leaf]
    while dotted and dotted not in FILES:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


@cache
def imports() -> dict[str, set[str]]:
    graph = {}
    for name in FILES:
        used = {module_of(dotted) for dotted in names_imported(name)} - {None, name}
        # Importing a module imports the packages around it first; a package may import its own parts.
        around = {".".join(one.split(".")[:depth]) for one in used for depth in range(1, one.count(".") + 1)}
        graph[name] = used | {package for package in around if not f"{name}.".startswith(f"{package}.")}
    return graph


def test_the_imports_make_no_circle():
    try:
        order = list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    assert set(order) == set(FILES)
    assert {"taperlit.norm", "taperlit.folding", "taperlit.decode.engine"} < set(INNER)
    assert order.index("taperlit.norm") < order.index("taperlit.folding") < order.index("taperlit.cli.train")


@pytest.mark.parametrize("name", INNER)
def test_an_inner_room_knows_neither_lightning_nor_processes(name):
    reached, todo = {}, {name: (name,)}  # each module with the way to it
    while todo:
        module, way = todo.popitem()
        reached[module] = way
        todo |= {used: (*way, used) for used in imports()[module] if used not in reached}
    for module, way in reached.items():
        outside = [d for d in names_imported(module) if any(f"{d}.".startswith(f"{o}.") for o in OUTSIDE)]
        assert not outside, f"{' -> '.join(way)} imports {outside}"


def test_the_inner_rooms_import_where_there_is_no_lightning():
    program = """
import importlib, sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    for old in [module for module in sys.modules if module.split(".")[0] == "taperlit"]:
        del sys.modules[old]  # each is the first
    importlib.import_module(name)
try:
    import lightning
except ImportError:
    print("none")
"""
    run = subprocess.run([sys.executable, "-c", program, *INNER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "none\n"


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, taperlit; dir(taperlit); print({'torch', 'lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_public_names_are_what_they_say_and_no_submodules():
    modules = {module.name for module in pkgutil.iter_modules(taperlit.__path__)}
    assert not modules & set(taperlit.__all__)
    for name, home in taperlit._HOMES.items():
        thing = getattr(taperlit, name)
        assert not inspect.ismodule(thing)
        assert thing is getattr(importlib.import_module(home), name)
        assert name in dir(taperlit)
    from taperlit import fold, taper

    assert fold is sys.modules["taperlit.folding"].fold
    assert taper is sys.modules["taperlit.surgery"].taper


def test_every_module_has_a_docstring():
    assert [name for name in FILES if not ast.get_docstring(tree(name))] == []


def test_callbacks_do_not_know_each_other_nor_our_transformer():
    room = [name for name in FILES if name.startswith("taperlit.callbacks.")]
    callbacks = {
        name
        for name in room
        for thing in vars(importlib.import_module(name)).values()
        if inspect.isclass(thing) and issubclass(thing, Callback) and thing.__module__ == name
    }
    assert len(callbacks) > 5
    for name in room:
        assert not imports()[name] & {*callbacks, "taperlit.transformer"}, name


LIGHTNING_OBJECTS = ("trainer", "strategy", "fit_loop", "epoch_loop", "loggers", "logger", "precision_plugin", "plugin")


def private_uses(name: str) -> Iterator[str]:
    """Where a module reaches into Lightning, line by line."""
    lightning = set()  # the names that it imports from there
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                dotted = f"{module}.{alias.name}".strip(".")
                if dotted.split(".")[0] in OUTSIDE:
                    lightning.add(alias.asname or alias.name.split(".")[0])
                    if any(part.startswith("_") for part in dotted.split(".")):
                        yield f"{name}:{node.lineno} imports {dotted}"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            around = {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
            around |= {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            if around & {*LIGHTNING_OBJECTS, *lightning}:
                yield f"{name}:{node.lineno} takes {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            around = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[0])}
            attribute = getattr(node.args[1], "value", "")
            if around & {*LIGHTNING_OBJECTS, *lightning} and isinstance(attribute, str) and attribute[:1] == "_":
                yield f"{name}:{node.lineno} takes {ast.unparse(node)}"


def private_overrides(name: str) -> Iterator[str]:
    """What a module's classes take from, or put over, the private parts of Lightning's classes that they extend."""
    module = importlib.import_module(name)
    for node in ast.walk(tree(name)):
        kind = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if not inspect.isclass(kind):
            continue
        theirs: set[str] = set()
        for base in kind.__mro__:
            if base.__module__.split(".")[0] in OUTSIDE:
                theirs |= {*vars(base)}
                source = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))
                theirs |= {part.attr for part in ast.walk(source) if isinstance(part, ast.Attribute)}
        defined = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        used = {
            part.attr
            for part in ast.walk(node)
            if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self"
        }
        for attribute in sorted(defined | used):
            if attribute.startswith("_") and not attribute.endswith("__") and attribute in theirs:
                yield f"{name}: {node.name}.{attribute} is Lightning's"


def test_lightnings_private_parts_are_touched_in_one_file():
    outer = [name for name in FILES if any(d.split(".")[0] == "lightning" for d in names_imported(name))]
    assert COMPAT in outer
    outer = [name for name in FILES if name not in {*INNER, COMPAT}]
    assert [use for name in outer for use in private_uses(name)] == []
    assert [use for name in outer for use in private_overrides(name) if name.count(".") > 1] == []


def test_the_test_extra_has_what_the_others_have():
    needed = {extra: set() for extra in importlib.metadata.metadata("taperlit").get_all("Provides-Extra")}
    for line in importlib.metadata.requires("taperlit"):
        requirement = Requirement(line)
        for extra in needed:
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                needed[extra].add(f"{requirement.name}{requirement.specifier}")
    assert len(needed) >= 6
    assert all(needed.values())
    assert all(each <= needed["test"] for each in needed.values())  # tools/setup.sh relies on it
