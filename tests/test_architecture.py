"""Imports go one way, the core needs torch alone, and optional packages are imported only when used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.conftest import STARTED_ONCE

SOURCE = Path(__file__).parent.parent / "src" / "graft"

#: Room → its modules. docs/architecture.md draws the same map; a new module gets a place in both.
ROOMS = {
    "numbers": "errors layout rounding kernel kernel.build checksum delta undo",
    "carrier": "adapter algebra dora fingerprint",
    "engines": "engines engines.*",
    "model": (
        "kinds options factors shadow branches branches_megatron adapted attach layers targets "
        "megatron_options adapting held fusing effective model verify_model"
    ),
    "storage": (
        "safetensors_header pickled mapped atomic weight_names checkpoint pipeline tensors shared_files"
    ),
    "formats": "bind bind_* formats formats.*",
    "files": "files files.* fuse_files verify_files inspect_files",
    "bridge": "saving loading export_model export_write",
    "compat": "compat compat.*",
    "train": "train train.*",
    "cli": "cli cli.* __main__",
}

#: Room → the rooms that it may import, besides itself.
BELOW = {
    "numbers": "",
    "carrier": "numbers",
    "engines": "numbers",
    "model": "numbers carrier engines",
    "storage": "numbers",
    "formats": "numbers carrier storage",
    "files": "numbers carrier storage formats",
    "bridge": "numbers carrier engines model storage formats",
    "compat": "numbers carrier engines model storage formats bridge",
    "train": "numbers carrier engines model storage formats bridge",
    "cli": "numbers carrier storage formats files",
}

#: Packages that a module of the room may import when it is itself imported.
OUTSIDE = {
    **dict.fromkeys(ROOMS, frozenset({"torch"})),
    "storage": frozenset({"torch", "safetensors"}),
    "formats": frozenset({"torch", "safetensors"}),
    "cli": frozenset({"torch", "click", "rich"}),
}

MODULES = sorted(
    ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for p in SOURCE.rglob("*.py")
    if p != SOURCE / "__init__.py"
)


def room_of(module: str) -> str:
    for room, members in ROOMS.items():
        if any(fnmatchcase(module, member) for member in members.split()):
            return room
    pytest.fail(f"graft.{module} has no room; give it one here and in docs/architecture.md")


def tree(module: str) -> ast.Module:
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def inner(module: str) -> Iterator[str]:
    """Modules of Graft that this one imports anywhere, also inside functions."""
    is_package = SOURCE.joinpath(*module.split(".")).is_dir()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in origin if part)
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                if full in MODULES:
                    yield full
                elif base:
                    yield base


def outer(module: str) -> set[str]:
    """Packages that are imported as soon as this module is."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
        waiting.extend(ast.iter_child_nodes(node))
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    allowed = {room, *BELOW[room].split()}
    wrong = {target: room_of(target) for target in inner(module) if room_of(target) not in allowed}
    assert not wrong, f"graft.{module} ({room}) may import {sorted(allowed)} only"


@pytest.mark.parametrize("module", MODULES)
def test_packages_beyond_torch_are_imported_only_when_used(module: str) -> None:
    assert outer(module) <= OUTSIDE[room_of(module)]


def test_no_two_modules_import_each_other() -> None:
    graph = {module: set(inner(module)) - {module} for module in MODULES if "." not in module}
    done: set[str] = set()
    while ready := {m for m in graph if m not in done and (graph[m] & graph.keys()) <= done}:
        done |= ready
    assert done == graph.keys(), f"a circle among {sorted(graph.keys() - done)}"


def test_the_map_names_no_module_that_is_gone() -> None:
    named = {member for members in ROOMS.values() for member in members.split()}
    assert {n for n in named if not any(fnmatchcase(m, n) for m in MODULES)} == set()


def test_the_drawn_map_names_every_module_and_no_other() -> None:
    text = (SOURCE.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"([\w*]+)(?:\.py|/)(?=[\s,])", text.split("```")[1])
    drawn = set(names) - {"graft", "peft", "loralib"}
    tops = {module.partition(".")[0] for module in MODULES}
    assert {top for top in tops if not any(fnmatchcase(top, name) for name in drawn)} == set()
    assert {name for name in drawn if not any(fnmatchcase(top, name) for top in tops)} == set()


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
import torch
import graft

layer = graft.Linear(4, 4, rank=2)
graft.fuse(layer)
graft.unfuse(layer)
print("done")
"""


def test_the_core_works_without_any_optional_package() -> None:
    names = ["deepspeed", "megatron", "peft", "transformers", "lightning", "accelerate", "click", "rich"]
    code = BLOCKED.replace("{names}", repr(set(names)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    patterns: list[str] = pytestconfig.getini("norecursedirs")
    folders = {
        path.parent.relative_to(SOURCE.parent.parent) for path in Path(__file__).parent.rglob("test_*.py")
    }
    lost = [f for f in folders for part in f.parts for pattern in patterns if fnmatchcase(part, pattern)]
    assert not lost and len(folders) > 5


def test_every_file_of_tests_that_start_processes_once_goes_to_one_worker() -> None:
    tests = Path(__file__).parent
    marked = {
        str(path.relative_to(tests.parent))
        for path in tests.rglob("test_*.py")
        if "pytest.mark.dist" in (text := path.read_text())
        and re.search(r'scope="module"\)\ndef (folder|results)', text)
    }
    assert marked == STARTED_ONCE
