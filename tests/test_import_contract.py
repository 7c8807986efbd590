"""The layers: the contract holds, and a forbidden import breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

#: What `lint-imports` does, from this environment whatever is on PATH.
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def copy(root, tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "pagedtq", tmp_path / "pagedtq", ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    command = [sys.executable, "-c", LINT, "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_of_the_package_point_one_way(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imports point one way KEPT" in done.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("errors", "pagedtq.config"),
        ("config", "pagedtq.paging.layout"),
        ("codec", "pagedtq.paging.layout"),
        ("paging", "pagedtq.codec"),
        ("paging", "pagedtq.backends.kernel_source"),
        ("backends", "pagedtq.cache"),
        ("models", "pagedtq.sizing"),
        ("cache", "pagedtq.sim"),
        ("cache", "pagedtq.serving"),
        ("serving", "pagedtq.sim"),
        ("serving", "pagedtq.integrations.vllm"),
        ("integrations", "pagedtq.sim"),
        ("sim", "pagedtq.cli"),
        ("wire", "pagedtq.telemetry"),
    ],
)
def test_forbidden_import_breaks_the_contract(copy, module, forbidden):
    source = copy / "pagedtq" / f"{module}.py"
    if not source.exists():
        source = copy / "pagedtq" / module / "offender.py"
    with source.open("a") as file:
        file.write(f"\nimport {forbidden}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "imports point one way BROKEN" in done.stdout
    assert forbidden in done.stdout


def test_importing_cupy_elsewhere_breaks_the_contract(copy):
    with (copy / "pagedtq" / "backends" / "cuda.py").open("a") as file:
        file.write("\nimport cupy\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "CuPy is imported behind its seams only BROKEN" in done.stdout


def test_module_without_a_layer_breaks_the_contract(copy):
    (copy / "pagedtq" / "helpers.py").write_text('"""Nowhere."""\n')
    done = lint(copy)
    assert done.returncode == 1
    assert "helpers" in done.stdout
