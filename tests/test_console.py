import dataclasses
import inspect
import itertools
import os
import pathlib
import re
import signal
import sys
import time

import pytest

import mtl_jax
from mtl_jax.__main__ import main
from mtl_jax.compare import load_problem, load_results
from mtl_jax.compare.command_line import Options, parameters

ROOT = pathlib.Path(__file__).parents[1]


def test_the_shell_completes_the_options(tmp_path):
    """As docs/index.md says."""
    with pytest.raises(SystemExit) as end:
        main(["--tyro-write-completion", "bash", str(tmp_path / "completion")])
    assert not end.value.code
    written = (tmp_path / "completion").read_text()
    assert "--weightings" in written
    assert "mtl-jax" in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "A problem is needed, as package.module:name"),
        (["math"], "named as package.module:name; got 'math'. Is it 'math:problem'"),
        (["math.py:tau"], "named as package.module:name; got 'math.py:tau'. Is it 'math:tau'"),
        ([":problem"], "named as package.module:name; got ':problem'"),
        (["./mine/here.py:problem"], ".*got './mine/here.py:problem'. Is it 'mine.here:problem'"),
        (["./here:problem"], "named as .*got './here:problem'. Is it 'here:problem'"),
        ([".here:problem"], "named as .*got '.here:problem'. Is it 'here:problem'"),
        (["math:sqrt"], "'math:sqrt' cannot be called without arguments: missing a required"),
        (["--weightings", "dwa", "m:p"], "A problem is needed.*Put m:p before --weightings"),
        (["m:p", "--processes", "2"], "--coordinator, --processes and --process are for --dist"),
        (["m:p", "--distributed", "--coordinator", "host"], "--coordinator has no port: host"),
        (["toy_problem:make_problem", "--learning-rate", "nan"], "`learning_rate` must be in"),
        (["no_such_module:problem"], "'no_such_module:problem': No module named 'no_such_module'"),
        (["math:taw"], "The module 'math' has no 'taw'"),
        (["math:tau"], "'math:tau' is a float; a Problem is wanted"),
        (["toy_problem:make_problem", "--weightings", "dvwa"], "no weighting 'dvwa'.*'dwa'"),
        (["toy_problem:make_problem", "--batch-size", "20", "--data-parallel"], ".*devices, 8"),
        (["m:p", "--distributed", "--peer-timeout", "0"], "--peer-timeout must be at least 1"),
    ],
)
def test_a_wrong_problem_is_said_plainly(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["compare", *arguments])
    assert error.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in printed
    assert re.match(f"error: .*{message}", printed), printed


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["compare", "--no-such-option"]])
def test_a_wrong_command_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_problem_in_the_working_folder_is_compared(tmp_path, monkeypatch, capsys):
    """The example for tables, shortened by the command line's own options."""
    module = (ROOT / "examples" / "tabular.py").read_text()
    assert len(module.splitlines()) < 70
    (tmp_path / "my_problem.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = "compare my_problem:problem --seeds 1 --weightings adaptive --epochs 5 --name mine"
    main(words.split())
    table = load_results(tmp_path / "runs" / "mine").query("split == 'test' and epoch == 5")
    for rows in (table.query("weighting == 'adaptive'"), table.query("weighting == 'bmi alone'")):
        assert len(rows)
        assert (rows["value"] < 0.8).all()  # the mean predicts it with 1
    report = (tmp_path / "runs" / "mine" / "diabetes.md").read_text()
    assert f"    mtl-jax {words}" in report
    assert "adaptive" in capsys.readouterr().out
    # And shown again, without training.
    page = tmp_path / "runs" / "mine" / "report.html"
    before = page.read_text()
    page.unlink()
    monkeypatch.setattr("mtl_jax.compare.training.Trainer.run", None)
    main(["report", "runs/mine"])
    assert page.read_text() == before
    assert "adaptive" in capsys.readouterr().out


def test_the_folder_of_the_data_is_handed_on(tmp_path, monkeypatch):
    text = "from toy_problem import make_problem\n\n\ndef build(data_dir):\n"
    (tmp_path / "of_data.py").write_text(text + "    return make_problem(name=data_dir)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_problem("of_data:build", "my_data").name == "my_data"


def test_list_shows_every_method_with_all_its_parameters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["list"])
    printed = capsys.readouterr().out
    for name, method in mtl_jax.METHODS.items():
        (row,) = re.findall(rf"^\s*{name}\b(.*)$", printed, re.MULTILINE)
        for parameter in inspect.signature(method.factory).parameters:
            assert re.search(rf"\b{parameter}\b", parameters(method.factory))
        if len(parameters(method.factory)) < 60:  # on one line
            assert parameters(method.factory) in row
        assert all(label in row for label, _ in method.sources[:1])
    for reads in {method.reads for method in mtl_jax.METHODS.values()}:
        assert len(re.findall(rf"^\s*reads {reads}  ", printed, re.MULTILINE)) == 1
    folders = pathlib.Path(mtl_jax.__file__).parent.glob("*_*/*.py")
    assert set(mtl_jax.METHODS) == {path.stem for path in folders} & set(mtl_jax.__all__)


def test_every_method_names_its_source():
    without = {name for name, method in mtl_jax.METHODS.items() if not method.sources}
    assert without == {"adaptive"}


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "mtl_jax.compare.command_line", raising=False)
    with pytest.raises(SystemExit) as error:
        main(["list"])
    assert error.value.code == 2
    assert "pip install 'mtl-jax[compare]'" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["compare", "report"])
def test_no_line_of_the_help_ends_in_the_middle(subcommand, capsys, monkeypatch):
    """The first word of each line of a paragraph would not have fitted on the one before."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        main([subcommand, "--help"])
    lines = [line.replace("│", " ") for line in capsys.readouterr().out.splitlines()]
    number = 0
    for before, line in itertools.pairwise(lines):
        column = len(line) - len(line.lstrip())
        if line.strip() and column >= 20 and before[column:].strip() and before[column - 1] == " ":
            word, start = line.split()[0], before[column:].rstrip()
            assert column + len(start) + 1 + len(word) > len(line.rstrip("\n")) - 2, (start, word)
            number += 1
    assert number > (20 if subcommand == "compare" else 0)


def test_options_are_explained(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Options):
        option = "--" + field.name.replace("_", "-")
        assert re.search(rf"{option}\b.*?[a-z]+ [a-z]+ [a-z]+.*?\(default: ", printed), option


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemError("from within JAX"), ValueError])
def test_an_interruption_is_one_whatever_it_comes_out_as(error, tmp_path, capsys, monkeypatch):
    """What is raised by the handler of a signal while JAX traces can become a SystemError."""

    def compare(*args, **options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr("mtl_jax.compare.command_line.compare", compare)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "toy_problem:make_problem", "--runs-dir", str(tmp_path)])
    assert ended.value.code == 128 + signal.SIGINT
    printed = capsys.readouterr().err
    assert printed.startswith("Interrupted. To continue:")
    assert "Traceback" not in printed
