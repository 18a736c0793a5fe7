"""requirements.txt resolves as the builder of a Space resolves it; asks the package index, so only with ARDIFF_NETWORK_TESTS=1.

    pip install --dry-run --ignore-installed --python-version 3.12 --only-binary=:all: --target space \\
        -r requirements.txt "gradio[oauth,mcp]==6.31.0" "uvicorn>=0.14.0" "websockets>=10.4" spaces
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff.serving.space import read_description


ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    os.environ.get("ARDIFF_NETWORK_TESTS") != "1", reason="asks the package index: ARDIFF_NETWORK_TESTS=1 runs it"
)


def resolve(requirements, tmp_path):
    card = read_description(ROOT).card
    python = ".".join(card["python_version"].split(".")[:2])
    # what the builder adds to requirements.txt, in one command with it
    added = [f"gradio[oauth,mcp]=={card['sdk_version']}", "uvicorn>=0.14.0", "websockets>=10.4", "spaces"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--python-version", python]
    command += ["--only-binary=:all:", "--target", str(tmp_path / "target"), "-r", str(requirements), *added]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


def test_requirements_resolve_beside_what_the_builder_adds(tmp_path):
    resolved = resolve(ROOT / "requirements.txt", tmp_path)
    assert resolved.returncode == 0, resolved.stderr
    assert "Would install" in resolved.stdout


def test_a_conflict_with_the_builder_is_seen(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("gradio==6.30.0\n")
    resolved = resolve(requirements, tmp_path)
    assert resolved.returncode != 0
    assert "ResolutionImpossible" in resolved.stderr or "conflict" in resolved.stderr
