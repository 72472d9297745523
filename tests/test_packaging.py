"""The package as users install it: wheel, sdist and editable install hold the same files, under the name `rarezoo`."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".json", ".md", ".typed")

if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
else:
    PROJECT = pytest.importorskip("tomli").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def folder_of(package: str) -> Path:
    """Where a package lies in the tree: the longest mapped prefix, then the rest of its name."""
    prefix = max((name for name in FOLDERS if package == name or package.startswith(f"{name}.")), key=len)
    return ROOT / FOLDERS[prefix] / package[len(prefix) :].strip(".").replace(".", "/")


def tree_files() -> set[str]:
    """What must be in the wheel, as paths below site-packages."""
    return {
        f"{package.replace('.', '/')}/{path.name}"
        for package in PACKAGES
        for path in folder_of(package).iterdir()
        if path.suffix in SUFFIXES or path.name == "py.typed"
    }


def run(*arguments, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tree without what builds leave in it."""
    folder = tmp_path_factory.mktemp("source") / "rarezoo"
    leave_out = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "runs", "site", "tests")
    shutil.copytree(ROOT, folder, ignore=leave_out)
    return folder


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    run("-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_every_package_is_listed():
    for package in PACKAGES:
        assert folder_of(package).is_dir(), f"pyproject.toml lists {package}, but there is no {folder_of(package)}"
    found = set()
    for prefix, folder in FOLDERS.items():
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]:
            if path.is_dir() and any(child.suffix in (".py", ".json") for child in path.iterdir()):
                found.add(".".join([prefix, *path.relative_to(ROOT / folder).parts]))
    assert found == set(PACKAGES)


def test_the_wheel_holds_the_tree(wheel):
    assert names_in(wheel) == tree_files()
    assert "rarezoo/py.typed" in names_in(wheel)
    assert "rarezoo/configs/mistral_splade/tiny.json" in names_in(wheel)


def test_the_wheel_has_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"rarezoo", f"rarezoo-{PROJECT['project']['version']}.dist-info"}


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"rarezoo-{PROJECT['project']['version']}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert metadata["Name"] == "rarezoo"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    assert "rarezoo = rarezoo.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert f"{folder}/licenses/LICENSE" in archive.namelist()


def test_the_sdist_builds_the_wheel_of_the_tree(source, wheel, tmp_path):
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    contents = [{name: zipfile.ZipFile(path).read(name) for name in names_in(path)} for path in (direct, wheel)]
    assert contents[0] == contents[1]


def test_the_sdist_holds_what_builds_and_explains_the_package(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "constraints.txt", "Makefile"} <= names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


_USE = """
import importlib, json, pathlib, sys
import rarezoo
from rarezoo.configs import list_presets
packages = json.loads(sys.argv[1])
folders = {name: str(pathlib.Path(importlib.import_module(name).__path__[0]).resolve()) for name in packages}
def importable(name):
    return importlib.util.find_spec(name) is not None
print(json.dumps({
    "folders": folders,
    "presets": list_presets("mistral_splade"),
    "foreign": [name for name in ("modeling", "configs", "conversion", "quantization", "cli") if importable(name)],
}))
"""


def test_the_wheel_works_when_installed(wheel, tmp_path):
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    answer = json.loads(run("-c", _USE, json.dumps(PACKAGES), cwd=tmp_path, PYTHONPATH=str(target)))
    assert answer["folders"] == {name: str(target.resolve() / name.replace(".", "/")) for name in PACKAGES}
    assert "tiny" in answer["presets"]
    assert answer["foreign"] == []
    assert "mistral_splade" in run("-m", "rarezoo.cli", "list", cwd=tmp_path, PYTHONPATH=str(target))


def test_an_editable_install_is_the_same_package(source, tmp_path):
    build = "import setuptools.build_meta as build, sys; build.build_editable(sys.argv[1])"
    run("-c", build, tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    # A .pth file works in a site folder only; this environment's own editable install must not answer instead.
    setup = f"""
import site, sys
def is_editable(name):
    return name.startswith("__editable__")
sys.meta_path[:] = [finder for finder in sys.meta_path if not is_editable(getattr(finder, "__module__", ""))]
for name in filter(is_editable, list(sys.modules)):
    del sys.modules[name]
sys.path.insert(0, {str(target)!r})
site.addsitedir({str(target)!r})
"""
    code = setup + _USE
    answer = json.loads(run("-c", code, json.dumps(PACKAGES), cwd=tmp_path))
    expected = {name: str(source.resolve() / folder_of(name).relative_to(ROOT)) for name in PACKAGES}
    assert answer["folders"] == expected
    assert "tiny" in answer["presets"]
    assert answer["foreign"] == []
