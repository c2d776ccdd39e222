"""The wheel holds what is tracked under privfm/, and the project's metadata agree with each other."""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import privfm

ROOT = Path(__file__).parents[1]


def package_files() -> set[str]:
    """What is tracked under privfm/; in an unpacked archive, which knows no git, what lies there."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "privfm"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {path for path in listed.split("\0") if path and (ROOT / path).exists()}
    lying = (path.relative_to(ROOT) for path in (ROOT / "privfm").rglob("*") if path.is_file())
    return {path.as_posix() for path in lying if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel built from a copy, so that nothing is left in the checkout and no leftover of it gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for path in package_files() | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"}:
        (sources / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, sources / path)
    for path in ("tests", "experiments"):  # stay out of the wheel, as the links do
        shutil.copytree(ROOT / path, sources / path, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("attacks", "defenses"):
        (sources / path).symlink_to(f"privfm/{path}")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(sources)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"\n{result.stdout}{result.stderr}"
    assert "Warning" not in result.stdout + result.stderr, f"\n{result.stdout}{result.stderr}"
    return ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_the_tracked_files_and_nothing_else(wheel: ZipFile) -> None:
    metadata = f"privfm-{privfm.__version__}.dist-info/"
    assert {name for name in wheel.namelist() if not name.startswith(metadata)} == package_files()


def test_wheel_says_what_it_is(wheel: ZipFile) -> None:
    folder = f"privfm-{privfm.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"privfm = privfm.cli:main" in wheel.read(f"{folder}/entry_points.txt")


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for text in "\n".join([setup["options"]["install_requires"], *extras.values()]).split():
        wanted = Requirement(text)
        assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_pins_name_versions_of_the_index_alone() -> None:
    """A local version (`2.13.0+cpu`) or a path exists on one machine only."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    strange = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)]
    assert strange == []


def test_citation_names_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'\nversion: "{privfm.__version__}"\n' in citation


@pytest.mark.parametrize("name", ["attacks", "defenses"])
def test_links_at_the_root_lead_into_the_package(name: str) -> None:
    assert (ROOT / name).readlink() == Path("privfm", name)
