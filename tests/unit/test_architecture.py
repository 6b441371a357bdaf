"""The rules the design stands on, read from the source: layers, who may import what, what is never written."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ftray

PACKAGE = Path(ftray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part imports only from parts before it. `core` and `catalog` resolve and build each other's pieces and
# count as one; `testing` is for tests and users' tests.
LAYERS = [
    {"core", "catalog"},
    {"config"},
    {"cluster"},
    {"data"},
    {"model"},
    {"adapt"},
    {"objective"},
    {"strategy"},
    {"optim"},
    {"delta"},
    {"registry"},
    {"engine"},
    {"eval"},
    {"train"},
    {"tune"},
    {"serve"},
    {"cli"},
    {"testing"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LIGHT = ["core", "catalog.py", "config", "cli/main.py"]
HEAVY = {"torch", "ray", "transformers", "peft", "datasets", "pyarrow"}


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def _name(path: Path) -> str:
    """`ftray/data/order.py` -> `ftray.data.order`."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _part(module: str) -> str | None:
    """`ftray.data.order` -> `data`; None for anything else."""
    head, _, rest = module.partition(".")
    return rest.partition(".")[0] if head == "ftray" and rest else None


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in a file, inside functions too, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node).endswith("import_module") and node.args:
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str):
                yield name, node.lineno


def _called(node: ast.Call) -> str:
    """Dotted name of what a call calls, as written."""
    return ast.unparse(node.func)


def test_every_part_is_in_the_layers() -> None:
    parts = {
        path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."
    }
    assert parts - {"py"} <= set(RANK), f"not in the layer order: {parts - set(RANK)}"


def test_a_part_imports_only_from_parts_before_it() -> None:
    wrong = []
    for path in MODULES:
        mine = _part(_name(path))
        for module, line in _imports(_parse(path)):
            other = _part(module)
            if mine and other in RANK and RANK[other] > RANK[mine]:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} ({mine}) imports {module} ({other})")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_testing() -> None:
    for path in MODULES:
        if _part(_name(path)) != "testing":
            assert "testing" not in {_part(module) for module, _ in _imports(_parse(path))}, path


def test_only_files_named_ray_import_ray() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}"
        for path in MODULES
        if not path.name.startswith("ray_")
        for module, line in _imports(_parse(path))
        if module.partition(".")[0] == "ray"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_modules() -> None:
    """Imports at the top of files form no cycle, so any module can be imported first."""
    names = {_name(path) for path in MODULES}
    graph = {
        _name(path): {
            found
            for module, _ in _imports(ast.Module(body=_at_top(_parse(path).body), type_ignores=[]))
            if (found := module if module in names else module.rpartition(".")[0]) in names
            and found not in (_name(path), "ftray")
        }
        for path in MODULES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def _at_top(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run when a module is imported; those for type checkers only are left out."""
    kept: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            kept += _at_top(node.body) + _at_top(node.orelse)
        elif isinstance(node, ast.Try):
            kept += _at_top(node.body)
    return kept


def test_the_light_parts_import_nothing_heavy() -> None:
    wrong = []
    for light in LIGHT:
        root = PACKAGE / light
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            heavy = {module for module, _ in _imports(_parse(path)) if module.partition(".")[0] in HEAVY}
            if heavy:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}: {', '.join(sorted(heavy))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "statement",
    [
        "import ftray",
        "import ftray.core.spec, ftray.core.fs, ftray.catalog, ftray.config.load, ftray.config.recipe",
        "import ftray.config.job, ftray.config.serve, ftray.config.tune, ftray.config.evaluate",
        "import ftray.cli.main, ftray.cli.submit, ftray.cli.jobs",
        "from ftray.cli.main import main\ntry: main(['--help'])\nexcept SystemExit as end: assert not end.code",
    ],
)
def test_the_light_parts_load_nothing_heavy_when_they_run(statement: str) -> None:
    heavy = sorted(HEAVY)
    check = f"found = [name for name in {heavy} if name in sys.modules]\nassert not found, found"
    code = f"{statement}\nimport sys\n{check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_module_can_be_imported() -> None:
    """In one process, in order of name: no module needs another to be imported before it."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "ftray."):
        importlib.import_module(info.name)


def test_packages_say_nothing_on_import() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        body = _parse(path).body
        assert all(isinstance(node, ast.Expr) for node in body), (
            f"{path}: an __init__ holds a docstring at most"
        )


# What is never written


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in MODULES:
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Call):
                yield path, node


def _keyword(node: ast.Call, name: str) -> object:
    """The literal given for a keyword, `...` for an expression, None if it is not given."""
    for keyword in node.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def test_no_value_reaches_a_shell() -> None:
    for path, node in _calls():
        assert _keyword(node, "shell") in (None, False), f"{path}:{node.lineno}"
        assert _called(node) not in ("os.system", "os.popen", "subprocess.getoutput"), f"{path}:{node.lineno}"


def test_yaml_is_read_by_safe_loaders_only() -> None:
    for path, node in _calls():
        if _called(node) in ("yaml.load", "yaml.load_all"):
            loader = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
            assert path.name == "load.py" and loader == "_Loader", f"{path}:{node.lineno}"
        assert not _called(node).startswith(("yaml.unsafe", "yaml.full")), f"{path}:{node.lineno}"
    import yaml

    from ftray.config.load import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Nothing that comes from a file or a request; what goes through Ray's object store is pickled by Ray."""
    for path in MODULES:
        modules = {module.partition(".")[0] for module, _ in _imports(_parse(path))}
        found = modules & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
        assert not found or path.name.startswith("ray_"), path
    for path, node in _calls():
        if _called(node) == "torch.load":
            assert _keyword(node, "weights_only") is True, f"{path}:{node.lineno}"
        assert _called(node) not in ("eval", "exec"), f"{path}:{node.lineno}"
        assert _keyword(node, "allow_pickle") in (None, False), f"{path}:{node.lineno}"


def test_no_remote_code() -> None:
    """`trust_remote_code` is absent or literally False, never a value from a configuration."""
    for path, node in _calls():
        assert _keyword(node, "trust_remote_code") in (None, False), f"{path}:{node.lineno}"
    for path in MODULES:
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                        assert isinstance(value, ast.Constant) and value.value is False, (
                            f"{path}:{node.lineno}"
                        )
