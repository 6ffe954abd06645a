"""The documents: generated parts that are up to date, commands and links that exist."""

import re
from pathlib import Path

import click
import pytest

from models.documents import README, REFERENCE, ROOT, passes_table, readme, reference
from onnxlr.cli.commands import main

DOCUMENTS = sorted((*ROOT.glob("*.md"), *(ROOT / "models").glob("*.md")))
RENEW = "run python -m models.documents"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_readme_s_table_of_methods_is_that_of_the_passes() -> None:
    text = text_of(README)
    assert f"<!-- passes -->\n{passes_table()}<!-- /passes -->" in text, RENEW
    assert readme(text) == text, RENEW


def test_the_reference_is_that_of_the_command_line() -> None:
    text = text_of(REFERENCE)
    assert reference(text) == text, RENEW


def test_the_documents_name_every_command_and_flag() -> None:
    for name, command in main.commands.items():
        assert f"onnxlr {name}" in text_of(README)
        section = text_of(REFERENCE).partition(f"### `onnxlr {name}")[2].partition("\n### ")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert f"`{parameter.opts[0]}" in section, parameter.opts[0]
            else:
                assert str(parameter.metavar) in section.splitlines()[0]


def test_the_reference_names_every_variable_of_the_environment() -> None:
    sources = "".join(text_of(path) for path in (ROOT / "onnxlr").rglob("*.py"))
    named = set(re.findall(r"\bONNXLR_[A-Z_]+\b", sources))
    assert "ONNXLR_CACHE" in named
    environment = text_of(REFERENCE).partition("## Environment")[2].partition("\n## ")[0]
    assert named == {n for n in re.findall(r"`(\w+)`", environment) if n.startswith("ONNXLR_")}


def test_the_reference_gives_an_exit_code_for_every_kind_of_error() -> None:
    codes = text_of(REFERENCE).partition("<!-- exit codes -->")[2].partition("<!-- /")[0]
    assert [line.split(" | ")[0] for line in codes.splitlines()[3:]] == [
        "| 0",
        "| 1",
        "| 2",
        "| 3",
        "| 130",
    ]


def test_the_readme_is_one_screen_and_a_half() -> None:
    assert README.stat().st_size <= 8192
    blocks = re.findall(r"<!-- ci -->\n```\n(.*)\n```\n<!-- /ci -->", text_of(README))
    assert len(blocks) == 2
    fenced = text_of(README).split("```")[1::2]
    lines = [line for block in fenced for line in block.splitlines() if "&&" not in line]
    assert len(lines) > 20
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_links_of_a_document_exist(path: Path) -> None:
    text = text_of(path)
    for name in set(re.findall(r"python -m (models[.a-z_]*[a-z_])", text)):
        module = ROOT.joinpath(*name.split("."))
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert source.is_file(), name
        assert '__name__ == "__main__"' in text_of(source), name
    for link in set(re.findall(r"\]\(([^)]+)\)", text)):
        place, _, anchor = link.partition("#")
        if place.startswith("http"):
            continue
        target = path.parent / place if place else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", text_of(target), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, link
    for name in set(re.findall(r"`(tests/[\w/]+\.py)`", text)):
        assert (ROOT / name).is_file(), name
