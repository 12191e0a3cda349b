"""Every example runs, offline and without a warning, and says what it proved."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.dist.test_examples import LAUNCHED

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "adapt_train_save.py": "computes the same: True",
    "fuse_files.py": "bit for bit: True",
    "loralib_swap.py": "Graft 0.0e+00",
    "lightning_export.py": "alike, bit for bit: True",
    "loralib_to_huggingface.py": "largest difference from loralib's own merge",
    "trainer_export.py": "computes the same: True",
    "unfuse_exact.py": "every bit is back: True",
}
NEEDS = {"lightning_export.py": ("lightning", "peft"), "trainer_export.py": ("accelerate",)}


def test_every_example_is_run() -> None:
    found = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/main.py")]
    launched = {name.split()[0] for name in LAUNCHED}
    assert {p.relative_to(EXAMPLES).as_posix() for p in found} == SAYS.keys() | launched


@pytest.mark.filterwarnings(
    # of Lightning, PEFT and torch's loader, about each other
    "ignore:.* does not have many workers:UserWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:Found .* in eval mode at the start of training:UserWarning",
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
)
@pytest.mark.parametrize("name", SAYS)
def test_example(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind where it was started"
