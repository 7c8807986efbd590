"""What is shipped: the wheel, its kernels, its dependencies, and how little an import loads."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pagedtq
from pagedtq.backends import kernel_source
from pagedtq.errors import BackendUnavailable

HEAVY = (
    *("cupy", "torch", "matplotlib", "scipy", "tqdm", "pandas", "transformers", "rich"),
    *("zmq", "prometheus_client", "vllm"),
)


@pytest.fixture(scope="session")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory):
    """A wheel built from the sdist, the way an installer without a wheel gets it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert len(list(out.glob("*.tar.gz"))) == 1
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The folder the wheel was installed into, alone, without touching this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(target), str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run_python(code: str, first_on_path: Path, cwd: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(first_on_path)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_core_dependencies_are_numpy_and_msgspec_only(project):
    names = [dependency.split(">")[0] for dependency in project["dependencies"]]
    assert names == ["numpy", "msgspec"]


def test_version_has_one_source(project):
    assert "version" not in project
    assert "version" in project["dynamic"]


def test_citation_names_the_version_that_is_shipped(root):
    assert f"version: {pagedtq.__version__}\n" in (root / "CITATION.cff").read_text()


def test_public_names_exist_once():
    assert len(set(pagedtq.__all__)) == len(pagedtq.__all__)
    for name in pagedtq.__all__:
        assert getattr(pagedtq, name) is not None


def test_import_loads_nothing_heavy(root, tmp_path):
    code = f"import pagedtq; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code, root, tmp_path) == "[]"


def test_checkout_finds_its_own_kernels(root):
    assert kernel_source.kernel_folder() == root / "kernels"
    sources = kernel_source.read_kernels()
    assert set(sources) == {path.name for path in (root / "kernels").glob("*.cu*")}
    assert list(sources) == sorted(sources)


def test_every_kernel_opens_with_a_comment_that_says_what_it_is():
    for name, source in kernel_source.read_kernels().items():
        assert source.startswith(("//", "/*")), name


def test_digest_changes_with_text_name_and_boundary():
    digests = [
        kernel_source.digest_sources(sources)
        for sources in (
            {"a.cu": "x", "b.cuh": "y"},
            {"a.cu": "x", "b.cuh": "z"},
            {"a.cu": "x", "c.cuh": "y"},
            {"a.cu": "xy", "b.cuh": ""},
        )
    ]
    assert len(set(digests)) == 4
    assert kernel_source.digest_sources({"b.cuh": "y", "a.cu": "x"}) == digests[0]
    assert kernel_source.source_digest() == kernel_source.digest_sources(
        kernel_source.read_kernels()
    )


def test_missing_kernels_are_one_typed_error(monkeypatch, tmp_path):
    module = tmp_path / "pagedtq" / "backends" / "kernel_source.py"
    monkeypatch.setattr(kernel_source, "__file__", str(module))
    with pytest.raises(BackendUnavailable, match=r"expected CUDA sources in .*found none"):
        kernel_source.kernel_folder()


@pytest.mark.slow
def test_wheel_holds_package_kernels_and_licence_and_no_more(wheel, root):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"pagedtq-{pagedtq.__version__}.dist-info"
    package = {
        path.relative_to(root).as_posix()
        for path in (root / "pagedtq").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kernels = {f"pagedtq/kernels/{path.name}" for path in (root / "kernels").glob("*.cu*")}
    shipped = {name for name in names if not name.startswith(info)}
    assert "pagedtq/py.typed" in shipped
    assert shipped == package | kernels
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_installed_wheel_imports_away_from_the_checkout(installed, tmp_path):
    code = "import pagedtq; print(pagedtq.__file__, pagedtq.__version__)"
    path, version = run_python(code, installed, tmp_path).split()
    assert Path(path) == installed / "pagedtq" / "__init__.py"
    assert version == pagedtq.__version__


@pytest.mark.slow
def test_installed_wheel_reads_the_same_kernels_as_the_checkout(installed, tmp_path):
    code = (
        "from pagedtq.backends import kernel_source as k; print(k.kernel_folder());"
        "print(k.source_digest())"
    )
    folder, digest = run_python(code, installed, tmp_path).split()
    assert Path(folder) == installed / "pagedtq" / "kernels"
    assert digest == kernel_source.source_digest()


@pytest.mark.slow
def test_installed_wheel_has_the_console_command(wheel):
    info = f"pagedtq-{pagedtq.__version__}.dist-info"
    entries = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "pagedtq = pagedtq.cli:main" in entries
