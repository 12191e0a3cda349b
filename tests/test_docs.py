"""README's snippets run, the documented command line is the real one, and no link leads nowhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from graft.cli.app import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``base``, and with what README's Python snippets wrote beside it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("readme")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    names: dict[str, Any] = {"torch": torch, "model": model, "batches": [batch] * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(README, "python"):
            exec(compile(block, str(README), "exec"), names)  # README's own code is what is tested
        yield folder


def test_python_snippets_ran(workplace: Path) -> None:
    assert len(blocks(README, "python")) >= 2
    assert (workplace / "adapter" / "adapter_config.json").is_file()
    assert (workplace / "exported" / "config.json").is_file()


@pytest.fixture(scope="module")
def shell(workplace: Path) -> Path:
    """The folder after README's commands ran in it, in their order."""
    lines = [line for block in blocks(README, "bash") for line in block.splitlines() if line]
    assert len(lines) >= 4
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for line in lines:
            program, *arguments = shlex.split(line, comments=True)
            assert program == "graft", line
            result = CliRunner().invoke(cli, arguments, prog_name="graft")
            assert result.exit_code == 0, f"{line}\n{result.output}"
    return workplace


def test_shell_snippets_run(shell: Path) -> None:
    assert (shell / "fused-half" / "config.json").is_file()


def test_a_fused_readme_model_is_the_exported_one(shell: Path) -> None:
    """Two roads, one number: ``graft fuse`` of the saved adapter, and ``graft.export`` of the model."""
    from graft.tensors import open_checkpoint

    exported, fused = open_checkpoint(shell / "exported"), open_checkpoint(shell / "fused")
    assert exported.entries.keys() == fused.entries.keys()
    assert all(torch.equal(exported.read(name), fused.read(name)) for name in exported.entries)


def commands() -> dict[str, click.Command]:
    return {"graft": cli} | {f"graft {name}": command for name, command in cli.commands.items()}


@pytest.mark.parametrize("name", commands())
def test_the_documented_help_is_the_real_one(name: str) -> None:
    arguments = [*name.split()[1:], "--help"]
    result = CliRunner().invoke(cli, arguments, prog_name="graft", terminal_width=80)
    documented = blocks(ROOT / "docs" / "cli.md", "text")
    assert result.output in documented, f"docs/cli.md should hold this:\n{result.output}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"
