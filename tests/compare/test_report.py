import html
import io
import json
import re

import markdown_it
import numpy as np
import PIL.Image
import pytest
import rich.console
from made_runs import ACCURACY, EQUAL, made_results, made_tuning, shifted

from mtl_jax.compare import Results
from mtl_jax.compare.analysis import Analysis
from mtl_jax.compare.figures import CAPTIONS, losses_figure
from mtl_jax.compare.report import (
    Report,
    markdown_report,
    print_tables,
    report_main,
    settings_text,
    warnings_of,
    write_report,
)
from mtl_jax.compare.tables import Entry, Table

GAIN = {"topic": [0.100, 0.110, 0.090, 0.105], "depth": [0.1, -0.1, 0.2, -0.3]}
ROWS = {"equal": EQUAL, "gains": shifted(GAIN)}


def made(name="made", **options):
    return made_results(ROWS, name=name, alone=EQUAL, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a problem whose name is no name of a file."""
    folder = tmp_path_factory.mktemp("runs")
    results = made("my/own")
    for run in results.of("my/own")["gains"]:
        run.measured_at = "parameters"
        run.conflict = {"share": np.ones(18), "cosine": np.ones(18)}
    write_report(results, folder / "report")
    return folder / "report"


@pytest.fixture
def one_picture(monkeypatch):
    """Drawing takes time: of all pictures only one is made."""
    monkeypatch.setattr(
        "mtl_jax.compare.report.figures", lambda analysis: {"losses": losses_figure(analysis)}
    )
    monkeypatch.setattr("mtl_jax.compare.report.FORMATS", ("png",))


def test_a_folder_has_all_of_it(written):
    kinds = set(CAPTIONS)
    pictures = {f"my%2Fown_{kind}.{end}" for kind in kinds for end in ("png", "pdf", "svg")}
    names = {path.name for path in written.iterdir()}
    assert names == pictures | {"results.json", "timing.json", "report.html", "my%2Fown.md"}
    for kind in kinds:
        image = np.asarray(PIL.Image.open(written / f"my%2Fown_{kind}.png").convert("L"))
        assert image.shape[1] > 500
        assert (image < 128).mean() > 0.001
        assert (written / f"my%2Fown_{kind}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (written / f"my%2Fown_{kind}.svg").read_text()
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(kinds)
    assert page.count("<figcaption>") == len(kinds)
    timing = json.loads((written / "timing.json").read_text())
    assert timing["runs"][0]["provenance"]["versions"]["jax"] == "0.10.0"


def test_a_report_is_drawn_again_without_training(written, capsys):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    # Another version of JAX made them.
    timing = written / "timing.json"
    other = before["timing.json"].replace(b'"jax": "0.10.0"', b'"jax": "0.4.1"')
    timing.write_bytes(other)
    for path in (*written.glob("my*"), written / "report.html"):
        path.unlink()
    report_main(Report((written,)))
    printed = capsys.readouterr().out
    assert "gains: better in topic by 10, undecided in depth; mean +" in printed
    assert "Everything on one page" in printed
    after = {path.name: path.read_bytes() for path in written.iterdir()}
    page = before["report.html"].replace(b"0.10.0", b"0.4.1")
    assert after == before | {"timing.json": other, "report.html": page}
    timing.write_bytes(before["timing.json"])


def test_verdicts_over_several_folders(one_picture, tmp_path, capsys):
    for name in ("one", "two"):
        write_report(made(name), tmp_path / name, pictures=())
    numbers = (tmp_path / "one" / "results.json").read_bytes()
    folders = (tmp_path / "one", tmp_path / "two")
    report_main(Report(folders, out=tmp_path / "both", weighting="gains"))
    printed = capsys.readouterr().out
    assert "Over all problems" in printed
    assert "one: test metrics" in printed
    assert list(Results.read(tmp_path / "both").problems) == ["one", "two"]
    verdicts = (tmp_path / "both" / "verdicts.md").read_text()
    assert "| gains against |" in verdicts.replace("  ", "").replace("|gains", "| gains")
    assert "one (4 seeds)" in verdicts
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.index("Over all problems") < page.index("The problem one.")
    # Into the first folder, its results stay its own: a comparison may go on from them.
    report_main(Report(folders))
    assert (tmp_path / "one" / "results.json").read_bytes() == numbers
    assert "The problem two." in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        ((), {}, "Name at least one folder"),
        (("nowhere",), {}, "nowhere holds no results of a comparison"),
        (("here",), {"weighting": "famo"}, "'famo' with: it, or another"),
        (("here", "other"), {}, "'made' differs between the folders in its epochs, 3 and 4"),
        (("broken",), {}, "results.json is damaged"),
    ],
)
def test_what_cannot_be_reported_is_said_plainly(folders, options, message, tmp_path, capsys):
    made().write(tmp_path / "here")
    made(epochs=4).write(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    with pytest.raises(SystemExit) as error:
        report_main(Report(tuple(tmp_path / folder for folder in folders), **options))
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_report_does_not_replace_another_comparison(tmp_path, capsys):
    made("one").write(tmp_path / "one")
    made("two").write(tmp_path / "two")
    (tmp_path / "two" / "records").mkdir()
    numbers = (tmp_path / "two" / "results.json").read_bytes()
    for out, weighting, message in (("two", None, "holds another"), ("new", "famo", "'famo' with")):
        with pytest.raises(SystemExit):
            report_main(Report((tmp_path / "one",), out=tmp_path / out, weighting=weighting))
        assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "two" / "results.json").read_bytes() == numbers
    assert not (tmp_path / "new").exists()


def test_markdown_finds_nothing_in_a_name():
    headers = ["weighting", "a|b <i>", "*c* `d`"]
    table = Table(headers, [[Entry("x|y"), Entry("1"), Entry("2")]])
    page = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(table.markdown())
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)
    assert [html.unescape(cell) for cell in cells] == [*headers, "x|y", "1", "2"]


def test_the_verdicts_come_first():
    results = made(tuning=made_tuning("equal", "gains", select="worst"))
    text = markdown_report(Analysis(results, "made"))
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["Verdicts", "After the last epoch"]
    assert titles[-1] == "Chosen by tuning"
    sentence = r"- gains: better in topic by 10, undecided in depth; mean \+9\.\d\d ± \d+\.\d\d %\."
    assert re.search(sentence, text)
    assert "\n\n**Beyond noise, no weighting is better than equal weights in the mean" in text
    assert "worst task's relative change from what it reached alone" in text
    assert "learning rate as tuned (default: 0.01); 4 seeds." in text
    assert "    mtl-jax compare my:problem" in text


def test_settings_name_the_datasets():
    results = made()
    info = results.problems["made"]
    examples = {"train": {"news": 9000, "reviews": 20}, "test": {"news": 100, "reviews": 5}}
    changed = {"examples": examples, "batch_size": {"news": 64, "reviews": 4}}
    results.problems["made"] = type(info)(**(vars(info) | changed))
    text = settings_text(Analysis(results, "made"))
    assert text.startswith("9,000 (news) + 20 (reviews) train, 100 (news) + 5 (reviews) test ex")
    assert "batch 64 (news) + 4 (reviews), learning rate 0.01; 4 seeds." in text


def test_what_the_reader_must_know():
    results = made()
    assert warnings_of(Analysis(results, "made")) == []
    results.planned["made"].append(("dwa", 0))
    results.runs[0].failure = "it did"
    results.runs[1].provenance = {"versions": {"jax": "0.9.0"}, "device": "1 x cpu (cpu)"}
    interrupted, failed, versions = warnings_of(Analysis(results, "made"))
    assert interrupted == "Interrupted: 1 run not finished."
    assert failed == "Failed: equal, seed 0: it did."
    assert "jax 0.10.0 (15 runs), 0.9.0 (1 run)." in versions
    assert "numpy" not in versions
    assert "**Interrupted: 1 run not finished.**" in markdown_report(Analysis(results, "made"))


def test_a_loss_that_rose_is_said():
    results = made()
    for run in results.of("made")["gains"]:
        run.train_losses = {"topic": [2.0, 1.0, 3.5], "depth": [2.0, 1.0, 2.5]}
    (warning,) = warnings_of(Analysis(results, "made"))
    assert warning == (
        "Diverged? With gains the mean training loss rose from the first to the last epoch: topic "
        "(from 2 to 3.5)."
    )


def test_a_report_of_an_interrupted_comparison(tmp_path):
    """After every run of it; without pictures."""
    results = made()
    runs = list(results.runs)
    for number in (0, 1, 3, 5, len(runs)):
        results.runs = runs[:number]
        write_report(results, tmp_path, pictures=())
        page = (tmp_path / "report.html").read_text()
        assert ("Interrupted" in page) == (number < len(runs))
    assert not list(tmp_path.glob("*.png"))


def test_a_weighting_against_every_other_one(tmp_path):
    write_report(made(), tmp_path / "plain", pictures=())
    assert not (tmp_path / "plain" / "verdicts.md").exists()
    write_report(made(), tmp_path / "of_gains", pictures=(), weighting="gains")
    table = (tmp_path / "of_gains" / "verdicts.md").read_text()
    assert "gains against" in table
    assert "equal |" in table
    assert "gains against" in (tmp_path / "of_gains" / "report.html").read_text()
    with pytest.raises(ValueError, match="famo"):
        write_report(made(), tmp_path / "unknown", pictures=(), weighting="famo")


def test_old_pictures_are_shown_or_removed(one_picture, tmp_path):
    write_report(made(), tmp_path, pictures=["made"])
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    write_report(made(), tmp_path, pictures=())
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    (tmp_path / "made_conflict.png").write_text("of an older report")
    write_report(made(), tmp_path, pictures=["made"])
    assert not (tmp_path / "made_conflict.png").exists()


def printed(results, width):
    console = rich.console.Console(width=width, file=io.StringIO())
    print_tables(results, "made", console)
    return console.file.getvalue()


def test_what_is_printed_fits_the_terminal():
    text = printed(made(), 160)
    assert "gains: better in topic by 10" in text
    assert "62.38 ± 2.55 better" in text
    tasks = {f"task {number}": ACCURACY for number in range(8)}
    row = {task: [0.5, 0.6, 0.7] for task in tasks}
    wide = made_results({"equal": row, "dwa": row}, tasks)
    text = printed(wide, 80)
    assert "│ task 7 accuracy, % ↑ │" in text  # a row a metric
    assert max(map(len, text.splitlines())) <= 80
