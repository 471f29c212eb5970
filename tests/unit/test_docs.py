"""The documentation is true: links resolve, code compiles, commands and options exist."""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlion_mpi.cli import parser as parser_of
from dlion_mpi.commands.launch import COMMANDS
from dlion_mpi.config.fields import declared
from dlion_mpi.config.options import TABLES
from dlion_mpi.metrics import records
from dlion_mpi.microcloud import environments
from dlion_mpi.simulation import free_network
from dlion_mpi.strategies.given import config_of
from dlion_mpi.strategies.registry import STRATEGIES, resolve
from tests.markdown import PAGES, ROOT, Block, anchors, blocks, every_block, label, links, prose, write_files

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent.name == "docs" else str(page))
SHELL = ("", "bash", "sh", "console")
# Options of other programs that the pages mention.
FOREIGN = {
    "--httpd",
    *("--allow-run-as-root", "--oversubscribe", "--bind-to", "--host", "--map-by", "--mca", "--prefix", "--mpi"),
    *("--nodes", "--ntasks-per-node", "--cpus-per-task", "--time", "--wait", "--signal", "--test-only", "--het-group"),
    *("--kill-on-bad-exit", "--pty", "--workload"),
}


@pytest.fixture
def beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with the pages' own files, as a reader would be who has followed them."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_check() -> None:
    assert len(PAGES) > 15
    assert len(every_block("python")) > 5
    assert len(list(commands())) > 30
    assert {"turns.py", "mynets.py", "with_horovod.py", "with_dlion_loop.py"} <= {
        block.file for block in every_block("python")
    }


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        assert goal.exists(), f"{target}: no such file"
        assert goal.is_relative_to(ROOT), f"{target}: outside the project"
        if anchor:
            assert anchor in anchors(goal), f"{target}: {goal.name} has {sorted(anchors(goal))}"


STOPS = re.findall(r"\[`([\w.]+)`\]\(\.\./(dlion_mpi/[\w/]+\.py)\)", prose(ROOT / "docs/architecture.md"))


@pytest.mark.parametrize(("name", "file"), STOPS)
def test_every_stop_of_the_tour_is_where_the_tour_says(name: str, file: str) -> None:
    """A stop is a function, a class, a method or the file itself."""
    tree: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in () if name == Path(file).name else name.split("."):
        found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part]
        assert found, f"{file} has no {name}"
        tree = found[0]


@pages
def test_every_page_has_one_title(page: Path) -> None:
    assert len(re.findall(r"^# ", prose(page), re.M)) == 1


@pytest.mark.parametrize(("page", "most"), [("README.md", 100), ("docs/decisions.md", 55)])
def test_a_page_that_is_read_first_stays_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most


def test_every_page_is_in_the_menu_once() -> None:
    """Where a page's name stands in a `toctree` of the index."""
    index = ROOT / "docs/index.md"
    listed = [
        (index.parent / f"{line}.md").resolve()
        for block in blocks(index)
        if block.language == "{toctree}"
        for line in block.text.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(listed) == [page for page in PAGES if page != index]


def test_the_reference_has_every_table_and_every_command() -> None:
    def directives(page: str, name: str) -> list[str]:
        found = (block.language for block in blocks(ROOT / "docs" / page))
        return [language.removeprefix(f"{{{name}}} ") for language in found if language.startswith(f"{{{name}}}")]

    tables_of_strategies = [name for name, cls in STRATEGIES.items() if any(declared(cls.Options))]
    assert sorted(directives("metrics.md", "measures")) == sorted(records.TABLES)
    assert sorted(directives("configuration.md", "options")) == sorted([*TABLES, *tables_of_strategies])
    assert sorted(directives("commands.md", "command")) == sorted(leaves(parser_of()))


def leaves(parser: argparse.ArgumentParser, *before: str) -> Iterator[str]:
    """The commands that have no commands below them."""
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, own in dict(below[0] if below else {}).items():
        yield from leaves(own, *before, name)
    if not below:
        yield " ".join(before)


# ---- code


@pytest.mark.parametrize("block", every_block("python"), ids=label)
def test_python_compiles(block: Block) -> None:
    compile(block.text, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize("block", every_block("json"), ids=label)
def test_json_can_be_read(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", every_block("toml"), ids=label)
def test_toml_is_an_environment_or_a_configuration(block: Block, beside_the_files: Path) -> None:
    path = beside_the_files / "block.toml"
    path.write_text(block.text, encoding="utf-8")
    if "[[phases]]" in block.text:
        assert environments.load(path).workers > 0
    else:
        resolve(config_of({"config": str(path)}))


# ---- commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `dlion`) of every command line in a block; one that `emulate run` starts is another."""
    for block in every_block(*SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            for words in simple_commands(line):
                for place, word in enumerate(words):
                    before = words[place - 1] if place else ""
                    if (word == "dlion" and before != "--strategy") or (word == "dlion_mpi" and before == "-m"):
                        yield f"{label(block)}: {line.strip()}", words[place + 1 :]


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of the commands that a line of shell runs one after the other, without redirections."""
    lexer = shlex.shlex(re.sub(r"(?<!\S)\d?>\S+", "", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for is_separator, words in itertools.groupby(lexer, lambda word: set(word) <= set(";&|()<>")):
        if not is_separator:
            yield list(words)


@pytest.mark.parametrize("words", [pytest.param(words, id=where) for where, words in commands()])
def test_a_command_line_is_taken_as_it_stands(words: list[str], beside_the_files: Path) -> None:
    (beside_the_files / "run.toml").touch()
    if words == ["--help"] or words[1:] == ["--help"]:
        return
    args = parser_of(words).parse_args(words)
    if words[0] == "launch" and args.rank_command[0] in COMMANDS:
        words = args.rank_command
        args = parser_of(words).parse_args(words)
    if words[0] in ("train", "simulate"):
        config = config_of(vars(args))
        if free_network.is_named(config) and words[0] == "simulate":
            free_network.resolve(config)
        else:
            resolve(config)
    if getattr(args, "env", None) and Path(args.env).suffix != ".toml":
        environments.load(args.env)


def known_options(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser and of all below it."""
    shown = [a for a in parser._actions if getattr(a, "full_help", a.help) != argparse.SUPPRESS]
    found = {option for action in shown for option in action.option_strings if option.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for own in action.choices.values() for option in known_options(own)}
    return found


@pages
def test_every_option_and_command_that_is_mentioned_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it also lists former options
        return
    known = known_options(parser_of()) | FOREIGN
    names = {words.split()[0] for words in leaves(parser_of())}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)?", code):
            assert option in known, f"`{code}`: no command has {option}"
        for name in re.findall(r"^dlion ([a-z]+)", code):
            assert name in names, f"`{code}`: no such command"


@pages
def test_every_source_file_that_is_mentioned_exists(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "log.md"):  # they also tell of former files
        return
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", prose(page)):
        assert (ROOT / name).exists() or (ROOT / "dlion_mpi" / name).exists(), name


def test_every_strategy_is_described() -> None:
    text = prose(ROOT / "docs/algorithms.md")
    for name in STRATEGIES:
        assert re.search(rf"\b{name}\b", text, re.I), name
