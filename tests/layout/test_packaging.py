"""What the build would do with this tree: nothing left out, nothing that switches us off, nothing private.

Every rule is a function of a folder, so that each is also shown to fail on a planted mistake.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from sgl_hq.launch import doctor
from sgl_hq.patches.ledger import SUPPORTED_SGLANG

ROOT = Path(__file__).parents[2]
MAPPED = ("kernels", "patches", "launch")  # top-level folders that become subpackages of sgl_hq

# Written in pieces so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/$}~-])/(?:"
    + "|".join(("ro" + "ot", "wo" + "rk", "ho" + "me", "Us" + "ers", "op" + "t", "tm" + "p"))
    + r")/[\w.]"
)
REGISTRY = re.compile(
    "|".join(
        (
            "index-" + "url",
            "find-" + "links",
            r"files\.python" + r"hosted\.org",
            r"pypi\.org/" + "simple",
            "artifact" + "ory",
        )
    )
)


def listed_packages(root: Path) -> dict[str, Path]:
    """Package name -> folder, as pyproject.toml states it."""
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = tool["package-dir"]
    return {name: root / mapped.get(name, name.replace(".", "/")) for name in tool["packages"]}


def package_folders(root: Path) -> set[Path]:
    """Folders that hold Python files and belong to the product."""
    files = [file for top in ("sgl_hq", *MAPPED) for file in (root / top).rglob("*.py")]
    return {file.parent for file in files}


def packaging_mistakes(root: Path) -> list[str]:
    listed = listed_packages(root)
    found = package_folders(root)
    mistakes = [
        f"{folder.relative_to(root)}: not listed, would be left out of the wheel"
        for folder in found - set(listed.values())
    ]
    mistakes += [
        f"{name}: listed, but {folder.relative_to(root)} holds no module"
        for name, folder in listed.items()
        if folder not in found
    ]
    mistakes += [
        f"{folder.relative_to(root)}: no __init__.py"
        for folder in listed.values()
        if not (folder / "__init__.py").is_file()
    ]
    if (root / "kernels" / "__init__.py").exists():
        mistakes.append(
            "kernels/__init__.py: hides the PyPI package `kernels` from transformers in a process started here"
        )
    mistakes += [
        f"{folder.relative_to(root)}: shadows installed packages under pytest"
        for folder in (root / "tests" / "__init__.py", root / "tests" / "kernels")
        if folder.exists()
    ]
    return mistakes


def entry_point_mistakes(root: Path) -> list[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    mistakes = [
        f"{group}: {project['entry-points'].get(group)} is not {expected}"
        for group, expected in doctor.ENTRY_POINTS.items()
        if project["entry-points"].get(group) != expected
    ]
    modules = {name: folder for name, folder in listed_packages(root).items()}
    targets = [target for group in project["entry-points"].values() for target in group.values()] + list(
        project["scripts"].values()
    )
    for target in targets:
        module, function = target.split(":")
        package, _, leaf = module.rpartition(".")
        places = [modules.get(module, root) / "__init__.py", modules.get(package, root) / f"{leaf}.py"]
        source = "".join(place.read_text() for place in places if place.is_file())
        if not re.search(rf"^def {function}\(", source, re.MULTILINE):
            mistakes.append(f"{target}: no such function")
    return mistakes


def private_text(files: list[Path]) -> list[str]:
    """Lines naming a place on one machine or a package registry; both make a clone fail elsewhere."""
    return [
        f"{file.name}:{number}: {line.strip()[:80]}"
        for file in files
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]


def files_of_the_repository() -> list[Path]:
    """Tracked, and those about to be: a mistake should show before it is committed."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_packages_equal_folders():
    assert packaging_mistakes(ROOT) == []


def test_entry_points_exist_and_are_the_only_ones():
    assert entry_point_mistakes(ROOT) == []


def test_doctor_and_ledger_agree_with_pyproject():
    assert set(doctor.PACKAGES) == set(listed_packages(ROOT))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"sglang=={SUPPORTED_SGLANG}" in dependencies


def test_scripts_can_be_run():
    for name in ("launch/demo.sh", "launch/test.sh", "launch/setup_env.sh", ".ci/run"):
        script = ROOT / name
        assert script.stat().st_mode & 0o111, f"{name} is not executable"
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_nothing_private_in_the_repository():
    files = files_of_the_repository()
    assert ROOT / "pyproject.toml" in files
    assert private_text(files) == []


# --- each rule fails on a planted mistake ---------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """The product's Python files and pyproject.toml, to be damaged."""
    for top in ("sgl_hq", *MAPPED):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert packaging_mistakes(tmp_path) == [] and entry_point_mistakes(tmp_path) == []
    return tmp_path


PLANTED_FILES = {
    "kernels/new_op/__init__.py": "kernels/new_op: not listed",
    "sgl_hq/quality/probes.py": "sgl_hq/quality: not listed",
    "kernels/__init__.py": "kernels/__init__.py: hides",
    "tests/__init__.py": "tests/__init__.py: shadows",
    "tests/kernels/test_x.py": "tests/kernels: shadows",
}


@pytest.mark.parametrize("planted", PLANTED_FILES)
def test_planted_file_is_found(copy, planted):
    (copy / planted).parent.mkdir(parents=True, exist_ok=True)
    (copy / planted).write_text("")
    assert any(mistake.startswith(PLANTED_FILES[planted]) for mistake in packaging_mistakes(copy))


def test_removed_package_is_found(copy):
    shutil.rmtree(copy / "patches")
    assert "sgl_hq.patches: listed, but patches holds no module" in packaging_mistakes(copy)


def edit_pyproject(root: Path, old: str, new: str) -> None:
    text = (root / "pyproject.toml").read_text()
    assert old in text
    (root / "pyproject.toml").write_text(text.replace(old, new))


PLATFORM = 'sgl_hq_cpu = "sgl_hq.platform_cpu:activate"\n'
PLANTED_EDITS = {
    "second platform": (PLATFORM, PLATFORM + 'sgl_hq_gpu = "sgl_hq.platform_cpu:activate"\n', "sglang.srt.platforms: "),
    "no platform": (PLATFORM, "", "sglang.srt.platforms: "),
    "renamed plugin": ("sgl_hq.plugin:register", "sgl_hq.plugin:start", "sglang.srt.plugins: "),
    "missing function": (
        "sgl_hq.launch.cli:main",
        "sgl_hq.launch.cli:no_main",
        "sgl_hq.launch.cli:no_main: no such function",
    ),
    "missing module": (
        "sgl_hq.launch.cli:main",
        "sgl_hq.launch.no_cli:main",
        "sgl_hq.launch.no_cli:main: no such function",
    ),
}


@pytest.mark.parametrize("planted", PLANTED_EDITS)
def test_planted_entry_point_is_found(copy, planted):
    old, new, expected = PLANTED_EDITS[planted]
    edit_pyproject(copy, old, new)
    assert any(mistake.startswith(expected) for mistake in entry_point_mistakes(copy))


PRIVATE = [
    f"cd {'/' + 'work'}/main",
    f'"{"/" + "root"}/.cache"',
    f"see {'/' + 'tmp'}/models",
    f"pip --{'index-' + 'url'} x",
    f"https://{'pypi.org/' + 'simple'}",
]
PUBLIC = [
    "https://github.com/a/work/b",
    "$HOME/work/x",
    "./tmp/x",
    "../root/x",
    "#!/usr/bin/env bash",
    "/proc/meminfo",
    "sgl_hq/root/x",
]


@pytest.mark.parametrize("line", PRIVATE)
def test_planted_private_text_is_found(tmp_path, line):
    (tmp_path / "notes.md").write_text(f"fine\n{line}\n")
    assert len(private_text([tmp_path / "notes.md"])) == 1


@pytest.mark.parametrize("line", PUBLIC)
def test_ordinary_text_is_not(tmp_path, line):
    (tmp_path / "notes.md").write_text(line)
    assert private_text([tmp_path / "notes.md"]) == []
