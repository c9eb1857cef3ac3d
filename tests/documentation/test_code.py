"""All code on all pages runs, from top to bottom, and finds what the page says."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
import tomllib

import pytest
from page_checks import CHECKS, no_step_was_skipped
from pages import PAGES, ROOT, commands, python_blocks, run

from experiments.problems import PROBLEMS
from mtl_jax.compare import WEIGHTINGS

WITH_CODE = [page for page in PAGES if python_blocks(page)]
COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs(page, tmp_path):
    check = CHECKS.get(page, no_step_was_skipped)
    check(run(page), tmp_path)


def test_every_check_has_its_page():
    assert set(CHECKS) <= set(WITH_CODE)


class ParsedError(Exception):
    """Raised in the place of running a program."""


def parsed(function):
    def parse(*args, **kwargs):
        raise ParsedError(function(*args, **kwargs))

    return parse


def check_python(words, monkeypatch):
    """The command line's own parser takes the flags; problems and weightings are known."""
    if words[0] == "mtl-jax":
        name, program, arguments = "mtl_jax.compare.command_line", None, words[1:]
    elif words[1] == "-m":
        name, program, arguments = words[2], None, words[3:]
    else:
        name, program, arguments = None, ROOT / words[1], words[2:]
    if program:
        parser = argparse.ArgumentParser
        monkeypatch.setattr(parser, "parse_args", parsed(parser.parse_args))
        monkeypatch.setattr(sys, "argv", [words[1], *arguments])
        with pytest.raises(ParsedError):
            runpy.run_path(str(program))
        return
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    monkeypatch.setattr(module.tyro, "cli", parsed(module.tyro.cli))
    with pytest.raises(ParsedError) as found:
        module.main(arguments)
    (options,) = found.value.args
    assert set(getattr(options, "weightings", ())) <= set(WEIGHTINGS)
    problems = getattr(options, "problem", ())
    assert all(problem in PROBLEMS or ":" in problem for problem in problems)


def check_make(words, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


def check_pip(words, monkeypatch):
    """It installs the working folder, with extras that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[1] == "install"
    (extras,) = re.fullmatch(r"\.(?:\[(.*)\])?", words[-1]).groups()
    assert set((extras or "compare").split(",")) <= set(project["optional-dependencies"])


PROGRAMS = {"python": check_python, "mtl-jax": check_python, "make": check_make, "pip": check_pip}


def test_there_are_commands():
    assert {shlex.split(command)[0] for command in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_right(command, monkeypatch):
    words = shlex.split(command, comments=True)
    PROGRAMS[words[0]](words, monkeypatch)
