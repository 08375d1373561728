# SPDX-License-Identifier: Apache-2.0
"""The repository keeps its shape: directions, the front door, and what the README promises."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    ".ci",
    "benchmarks",
    "build_engine",
    "docs",
    "edgecascade",
    "examples",
    "plugins",
    "tests",
)
GENERATED = {"__pycache__", "_lib"}

# What each module or package of edgecascade, and build_engine as a whole, may import of ours.
MAY_IMPORT = {
    "errors": "",
    "tensors": "",
    "backoff": "",
    "files": "errors",
    "version": "",
    "reserve": "errors tensors",
    "ops": "errors tensors",
    "nodes": "errors ops tensors",
    "blocks": "errors tensors",
    "device": "errors",
    "sampling": "errors",
    "manifest": "errors files tensors",
    "verified": "files",
    "models": "errors ops tensors",
    "state": "errors reserve tensors",
    "bundle": "errors files manifest models tensors verified",
    "trace": "bundle errors manifest models nodes ops tensors",
    "engines": "bundle errors files manifest nodes trace",
    "backends": "blocks bundle device engines errors models nodes ops reserve sampling state "
    "tensors trace",
    "text": "errors",
    "inspect": "bundle device errors manifest models state tensors",
    "completion": "errors text",
    "sequence": "completion errors sampling text",
    "ticket": "backends completion engine errors sampling scheduler sequence",
    "session": "backends bundle completion errors sampling snapshots statefile text ticket",
    "scheduler": "errors",
    "snapshots": "backends errors text",
    "statefile": "backends errors files",
    "engine": "backends errors sampling scheduler snapshots",
    "llm": "backends bundle completion device engine errors sampling scheduler sequence session "
    "snapshots text ticket",
    "service": "backoff bundle completion device engine errors files llm sampling scheduler "
    "session text version",
    "client": "errors service text",
    "suite": "errors files text",
    "scoring": "completion suite",
    "evaluation": "completion errors llm sampling scoring suite text ticket",
    "fleet": "backoff bundle completion device errors files llm manifest service tensors verified "
    "version",
    "build_engine": "backends blocks bundle device engines errors files inspect manifest models "
    "nodes ops trace "
    "sampling tensors text verified version",
    "doctor": "backends device errors version",
    "bench": "backends bundle completion device doctor errors inspect llm sampling version",
    "cli": "backends bench bundle client completion device doctor errors evaluation fleet inspect "
    "llm sampling scoring service session suite text verified version",
    "__init__": "completion errors llm sampling session text",
    "__main__": "cli",
}
LAZY_ONLY = {"matplotlib", "onnx", "pycuda", "safetensors", "tensorrt", "torch", "transformers"}
DEVICE_MODULES = {"tensorrt": "backends", "pycuda": "backends", "ctypes": "backends"}


@dataclass(frozen=True)
class Import:
    """One import of ours: who, what, where, and whether it runs only when a function is called."""

    place: str  # key of MAY_IMPORT
    module: str
    file: str
    line: int
    lazy: bool

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def place_of(module: str) -> str:
    """edgecascade.models.nemotron_h -> models; build_engine.read -> build_engine."""
    package, _, rest = module.partition(".")
    return package if package == "build_engine" else rest.partition(".")[0] or "__init__"


def imports() -> Iterator[Import]:
    for file in sorted([*ROOT.glob("edgecascade/**/*.py"), *ROOT.glob("build_engine/**/*.py")]):
        name = file.relative_to(ROOT)
        module = ".".join(name.with_suffix("").parts)
        tree = ast.parse(file.read_text(), str(name))
        lazy = {id(n) for f in ast.walk(tree) if is_function(f) for n in ast.walk(f)}
        only_types = {id(n) for f in ast.walk(tree) if is_type_checking(f) for n in ast.walk(f)}
        for node in ast.walk(tree):
            for target in [] if id(node) in only_types else targets(node):
                yield Import(place_of(module), target, str(name), node.lineno, id(node) in lazy)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module in ("edgecascade", "build_engine"):
            return [f"{node.module}.{alias.name}" for alias in node.names]
        return [node.module]
    return []


IMPORTS = list(imports())


def test_arrows_point_down() -> None:
    allowed = {place: set(names.split()) for place, names in MAY_IMPORT.items()}
    wrong = [
        f"{each.where}: {each.place} must not import {each.module}"
        for each in IMPORTS
        if each.module.split(".")[0] in ("edgecascade", "build_engine")
        and place_of(each.module) not in allowed.get(each.place, set()) | {each.place}
        and not (each.place == "cli" and each.lazy and place_of(each.module) == "build_engine")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_place() -> None:
    places = {p.stem for p in ROOT.glob("edgecascade/*.py")}
    places |= {p.parent.name for p in ROOT.glob("edgecascade/*/__init__.py")}
    unknown = sorted(places - MAY_IMPORT.keys())
    assert not unknown, f"{unknown} are not in MAY_IMPORT: give each a place"


def test_the_table_of_arrows_has_no_circle() -> None:
    order = TopologicalSorter({place: names.split() for place, names in MAY_IMPORT.items()})
    assert next(iter(order.static_order())) in ("errors", "tensors")


def test_heavy_modules_are_imported_where_they_are_needed() -> None:
    wrong = [
        f"{each.where}: import {each.module} inside the function that needs it"
        for each in IMPORTS
        if each.module.split(".")[0] in LAZY_ONLY and not each.lazy
    ]
    assert not wrong, "\n".join(wrong)


def test_only_backends_know_devices() -> None:
    wrong = [
        f"{each.where}: {each.module} belongs to {DEVICE_MODULES[root]}"
        for each in IMPORTS
        if (root := each.module.split(".")[0]) in DEVICE_MODULES
        and each.place not in (DEVICE_MODULES[root], "device", "build_engine")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_do_not_know_tensorrt() -> None:
    kernels = [*ROOT.glob("plugins/cpu/**/*.*"), *ROOT.glob("plugins/cuda/**/*.*")]
    assert kernels
    assert not [str(f) for f in kernels if "NvInfer" in f.read_text()]


def test_front_door_is_narrow_and_whole() -> None:
    import edgecascade

    assert len(edgecascade.__all__) <= 12, "a front door this wide is a wall"
    assert [name for name in edgecascade.__all__ if not hasattr(edgecascade, name)] == []
    public = {n for n in vars(edgecascade) if not n.startswith("_")}
    modules = {p.stem for p in ROOT.glob("edgecascade/*")} | {"annotations"}
    assert public - modules <= set(edgecascade.__all__)


def test_version_is_written_once() -> None:
    from importlib.metadata import version

    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert version("edgecascade") == written[1]


def text_files() -> Iterator[Path]:
    kinds = {
        ".cpp",
        ".cmake",
        ".h",
        ".jinja",
        ".json",
        ".md",
        ".py",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
    }
    roots = [p for p in ROOT.iterdir() if p.is_file()]
    inside = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    for path in [*roots, *inside]:
        if not GENERATED & set(path.parts) and (
            path.suffix in kinds or path.name in ("Makefile", "run")
        ):
            yield path


def test_no_file_names_somebody_s_machine() -> None:
    pattern = re.compile(r"(?<![\w.}])/(root|home|work|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {hit[0]}"
        for path in text_files()
        if path != Path(__file__) and (hit := pattern.search(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_every_source_carries_its_licence() -> None:
    sources = [
        path
        for path in text_files()
        if path.suffix in {".py", ".h", ".cpp", ".cmake", ".toml"}
        or path.name in ("CMakeLists.txt", "Makefile", "run")
    ]
    bare = [
        str(path.relative_to(ROOT))
        for path in sources
        if "SPDX-License-Identifier: Apache-2.0"
        not in "".join(path.read_text().splitlines(True)[:2])
    ]
    assert len(sources) > 20
    assert not bare, f"first line must be the SPDX line: {bare}"


DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_lead_somewhere(doc: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", doc.read_text())
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    dead = [link for link in local if not (doc.parent / link).exists()]
    assert not dead, f"{doc.name} links to {dead}"


def test_commands_of_the_readme_exist() -> None:
    shell = "\n".join(
        re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = set(re.findall(r"\bmake ([a-z-]+)", shell))
    assert {"demo", "test"} <= asked <= targets
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\nmake demo\n" in ci
    assert "\nmake test\n" in ci


def test_make_builds_for_the_gpus_last_asked_for(tmp_path: Path) -> None:
    """No library for a GPU is left older than its sources, or not built because the CPU's is."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, does in {"python": 'echo "[$EDGECASCADE_CUDA_ARCHS]"', "edgecascade": ":"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "plugins").mkdir()
    kernel = tmp_path / "plugins" / "new.cu"
    for number, path in enumerate(
        ("pyproject.toml", "setup.py", "plugins/old.cu", ".venv/.created", ".venv/.installed")
    ):
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (number, number))

    def made(archs: str | None) -> str:
        wanted = {} if archs is None else {"EDGECASCADE_CUDA_ARCHS": archs}
        outer = ("EDGECASCADE_CUDA_ARCHS", "MAKEFLAGS", "MAKELEVEL")
        kept = {name: value for name, value in os.environ.items() if name not in outer}
        command = ["make", "-s", "setup"]
        return subprocess.run(
            command, cwd=tmp_path, env=kept | wanted, check=True, capture_output=True, text=True
        ).stdout.strip()

    asked = [None, None, "90", None, "90", "87;110", None]
    assert [made(archs) for archs in asked] == ["[]", "", "[90]", "", "", "[87;110]", ""]
    os.utime(tmp_path / ".venv" / ".kernels", (5, 5))  # before the new source
    kernel.touch()
    assert made(None) == "[87;110]"


def test_extras_are_installed_from_the_clone() -> None:
    """It is on no index, so that another package of this name would be installed."""
    text = "\n".join(path.read_text() for path in text_files() if path != Path(__file__))
    assert not re.findall(r"pip install\s+\S?edgecascade\S*", text)
    named = set(re.findall(r"pip install\s+'\.\[([\w,]+)\]'", text))
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project, re.MULTILINE))
    assert {"check", "engine", "fleet"} <= named <= extras


def test_cli_commands_of_the_docs_exist() -> None:
    from edgecascade.cli import build_parser

    action = next(a for a in build_parser()._actions if a.choices and a.dest == "command")
    known = set(action.choices or ())
    for doc in DOCS:
        shell = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", doc.read_text(), re.DOTALL))
        asked = set(re.findall(r"^\$? ?(?:\.venv/bin/)?edgecascade ([a-z-]+)", shell, re.MULTILINE))
        assert asked <= known, f"{doc.name} runs {sorted(asked - known)}"
