"""The import rule: cli, demo, serving > pipelines, training, evaluation, convert, benchmark > models, schedulers, data."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
RANK = {
    **dict.fromkeys(["models", "schedulers", "data"], 0),
    **dict.fromkeys(["pipelines", "training", "evaluation", "convert", "benchmark"], 1),
    **dict.fromkeys(["cli", "demo", "serving"], 2),
}
GRADIO_USERS = {"app.py", "ardiff/demo/ui.py"}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "app.py", *(ROOT / "ardiff").rglob("*.py")])
PACKAGE_FILES = [file for file in FILES if file.startswith("ardiff/")]


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(file) for file in PACKAGE_FILES}


def imported(tree: ast.AST, package: str = "") -> list[str]:
    """Every module that `tree` imports, anywhere in it; `from a import b` is a.b where that is a module of ours."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                full = f"{module}.{alias.name}"
                names.append(full if full in MODULES else module)
    return names


def imports_of(file: str) -> list[str]:
    module = module_name(file)
    package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
    return imported(parse(file), package)


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=file)


def unit(module: str) -> str | None:
    """The room of the house that `module` is in; None for `ardiff` itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ardiff" and len(parts) > 1 else None


def violations(importer: str, modules: list[str]) -> list[str]:
    """The imports among `modules` that a file of the room `importer` may not have."""
    bad = []
    for module in modules:
        target = unit(module)
        if target is None or target == importer:
            continue
        upward = RANK[target] > RANK[importer]
        siblings = {importer, target} == {"models", "schedulers"}
        if upward or siblings:
            bad.append(module)
    return bad


def test_every_room_has_a_rank():
    rooms = {unit(module) for module in MODULES} - {None}
    assert rooms <= set(RANK)


@pytest.mark.parametrize("file", [file for file in PACKAGE_FILES if unit(module_name(file))])
def test_imports_go_one_way(file):
    assert violations(unit(module_name(file)), imports_of(file)) == []


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("models", "ardiff.pipelines.pipeline_ardiff"),
        ("schedulers", "ardiff.models"),
        ("training", "ardiff.demo.session"),
    ],
)
def test_the_rule_refuses_a_wrong_import(importer, module):
    assert violations(importer, [module]) == [module]


def test_package_root_stays_below_cli_and_demo():
    assert [module for module in imports_of("ardiff/__init__.py") if unit(module) and RANK[unit(module)] > 1] == []


def test_only_the_top_layer_imports_from_the_package_root():
    users = {file for file in PACKAGE_FILES if "ardiff" in imports_of(file)}
    assert {unit(module_name(file)) for file in users} <= {"cli", "demo", "serving"}


def test_only_page_and_app_import_gradio():
    users = {file for file in FILES if any(module.split(".")[0] == "gradio" for module in imports_of(file))}
    assert users <= GRADIO_USERS


def test_demo_is_imported_by_nobody_below_cli():
    users = {file for file in PACKAGE_FILES if "demo" in {unit(module) for module in imports_of(file)}}
    assert {unit(module_name(file)) for file in users} <= {"cli", "demo", "serving"}


def test_cli_imports_the_demo_only_in_its_verb():
    for file in [file for file in PACKAGE_FILES if unit(module_name(file)) == "cli"]:
        for node in parse(file).body:
            demo = {module for module in imported(node) if unit(module) == "demo"}
            assert not demo or (isinstance(node, ast.FunctionDef) and node.name == "run_demo")


def test_everything_but_the_page_imports_without_gradio():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "import ardiff, importlib\n"
        "for name in ardiff.__all__: getattr(ardiff, name)\n"
        f"for name in {sorted(MODULES - {'ardiff.demo.ui'})}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
