"""What the files of the repository promise each other: requirements, Space card, README's tree and commands, weights."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ardiff.serving.space import header, make_plan, read_description


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
WEIGHT_SUFFIXES = {".bin", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"}


def repository_files() -> list[Path]:
    """Files that are tracked or could be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def tree_paths(text: str) -> list[str]:
    """Paths of the README's file tree: one entry a line, two spaces of indentation a level, folders end in a slash."""
    (block,) = re.findall(r"## Files\n.*?```text\n(.*?)```", text, flags=re.DOTALL)
    parents, paths = [], []
    for line in block.splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        del parents[level:]
        paths.append("".join(parents) + name)
        if name.endswith("/"):
            parents.append(name)
    return paths


# --- requirements -----------------------------------------------------------------------------------------------


def test_requirements_equal_the_dependencies():
    assert PYPROJECT["project"]["dependencies"] == REQUIREMENTS


@pytest.mark.parametrize("line", [*REQUIREMENTS, *EXTRAS["dev"], *EXTRAS["plots"]])
def test_every_requirement_is_one_pin(line):
    assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)


def test_development_installs_the_plots():
    assert set(EXTRAS["plots"]) <= set(EXTRAS["dev"])


def test_torch_comes_first():
    assert REQUIREMENTS[0].startswith("torch==")


def test_imports_are_requirements():
    optional = [line for extra in ("plots", "serve", "train") for line in EXTRAS[extra]]
    required = {re.split(r"==|\[", line)[0] for line in [*REQUIREMENTS, *optional]} | {"ardiff", "spaces"}
    distributions = importlib.metadata.packages_distributions()
    for path in [ROOT / "app.py", *(ROOT / "ardiff").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module.split(".")[0]]
            for name in set(names) - set(sys.stdlib_module_names):
                packages = {package.lower().replace("_", "-") for package in distributions.get(name, [name])}
                assert packages & required, (
                    f"{path.relative_to(ROOT)} imports {name}, which requirements.txt does not name"
                )


# --- Space card -------------------------------------------------------------------------------------------------


def test_readme_header_is_that_of_spaces_yaml():
    assert README.startswith(header(read_description(ROOT).card))


def test_space_is_one_that_can_be_deployed():
    plan = make_plan(ROOT, "me/ardiff", {})
    assert f"gradio=={plan.description.card['sdk_version']}" in REQUIREMENTS
    assert plan.description.card["python_version"] == "3.12.12"
    assert plan.description.card["suggested_hardware"] == plan.description.space.hardware


def test_space_gets_no_file_that_git_ignores():
    plan = make_plan(ROOT, "me/ardiff", {})
    assert set(plan.files.values()) <= set(repository_files())
    assert {path for path in repository_files() if path.is_relative_to(ROOT / "ardiff")} <= set(plan.files.values())


# --- README -----------------------------------------------------------------------------------------------------


def test_readme_has_the_two_commands():
    assert "\npython -m pip install -r requirements.txt && python app.py\n" in README
    assert '\npython -m pip install -e ".[dev]" && python -m pytest -n 2\n' in README


def test_ci_runs_the_readme_set_up():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert 'python -m pip install -e ".[dev]"' in script
    assert script[-1] == "ARDIFF_REQUIRE_BROWSER=1 python -m pytest -n 2"


def test_tree_is_on_disk():
    paths = tree_paths(README)
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/"), path


def test_tree_names_every_module():
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ardiff").rglob("*.py")}
    modules = {module for module in modules if not module.endswith("__init__.py")}
    assert modules <= set(tree_paths(README))


def test_readme_pictures_and_links_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


# --- weights ----------------------------------------------------------------------------------------------------


def test_weights_are_safetensors():
    assert [path for path in repository_files() if path.suffix.lower() in WEIGHT_SUFFIXES] == []


def test_bundled_models_are_small():
    models = [path for path in repository_files() if path.is_relative_to(ROOT / "assets/models")]
    assert sum(path.stat().st_size for path in models) <= 40 * 2**20


def test_files_speak_of_no_machine():
    pattern = re.compile(rb"/(?:home|root|Users)/\w")
    named = [
        path for path in repository_files() if path.suffix in {".md", ".py", ".toml", ".yaml", ".json", ".js", ".css"}
    ]
    assert [path for path in named if pattern.search(path.read_bytes())] == []
