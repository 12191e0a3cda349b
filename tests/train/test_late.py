"""No framework is imported for a callback's class, and the program's own is used for its objects."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from graft.train.late import Late

CODE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
{code}
"""


def run(code: str, *blocked: str) -> str:
    text = CODE.replace("{blocked}", repr(set(blocked))).replace("{code}", code)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate", "peft", "deepspeed")


def test_importing_the_classes_imports_no_framework() -> None:
    code = """
import graft
from graft.train import late, lightning, transformers

print(lightning.ExportCallback.__name__, transformers.ExportCallback.__name__)
late.find_spec = lambda name: None
for module in (lightning, transformers):
    try:
        module.ExportCallback("e/{epoch}")
    except graft.StateError as error:
        print(error)
"""
    names, *errors = run(code, *FRAMEWORKS).splitlines()
    assert names == "ExportCallback ExportCallback"
    assert [error.partition(", ")[0] for error in errors] == [
        "this callback is for lightning",
        "this callback is for transformers",
    ]


def test_the_framework_that_the_program_has_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Late):
        _homes, _base = ("first.of", "second"), "Callback"

    made = {name: ModuleType(name) for name in ("first.of", "second")}
    for module in made.values():
        module.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    for used in (["second"], ["first.of"], ["first.of", "second"]):
        with monkeypatch.context() as patch:
            for name in used:
                patch.setitem(sys.modules, name, made[name])
            one = Mine()
            assert isinstance(one, Mine) and type(one) is type(Mine())
            for name, module in made.items():
                assert isinstance(one, module.Callback) == (name in used)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)

    class Both(Mine, made["first.of"].Callback, made["second"].Callback):  # type: ignore[name-defined,misc]
        pass

    assert type(Both()) is Both
