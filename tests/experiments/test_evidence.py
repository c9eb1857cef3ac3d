"""The pages of results are made from kept records."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from made_runs import ACCURACY, EQUAL, TASKS, made_results, made_tuning, shifted

from experiments.evidence import (
    MARK,
    PUBLISHED,
    Tuned,
    anywhere,
    main,
    of_errors,
    predictors_figure,
    properties,
    unfinished,
)
from mtl_jax.compare import MetricInfo, Results, Trial
from mtl_jax.compare.report import Report, report_main
from mtl_jax.evaluation import delta_m, mean_interval

NAMES = ("mean", "errors", "worst", "emphasis", "learning rate")
NAMES += ("properties", "published", "in small")
MARKS = "".join(
    f"<!-- {name}: {MARK} -->\nold\n<!-- end of {name} -->\nbetween\n" for name in NAMES
)
ALONE = {task: list(1.1 * np.array(values)) for task, values in EQUAL.items()}
ROWS = {
    "equal": EQUAL,
    "constant": shifted({"topic": -0.001, "depth": 0.0}),
    "adaptive": shifted({"topic": [0.1, 0.11, 0.1, 0.1], "depth": [0.5, 0.5, 0.51, 0.5]}),
    "dwa": shifted({"topic": [0.01, -0.01, 0.0, 0.0], "depth": [0.01, -0.01, 0.0, 0.01]}),
    "upgrad": shifted({"topic": 0.05, "depth": 0.0}),
}


def comparison(select, name="made"):
    tuning = made_tuning(*ROWS, "topic alone", "depth alone", select=select)
    gain = {"adaptive": 0.4, "upgrad": 0.005}

    def trial(rate, score):  # all that is gained is gained in the first task
        accuracy = [0.1, 0.5 * (1 + 2 * score)]
        validation = {"topic": {"accuracy": accuracy}, "depth": {"error": [1.0]}}
        return Trial(rate, validation=validation, score=score)

    trials = {
        row: [trial(0.01, gain.get(row, 0.0)), trial(0.03, gain.get(row, 0.0) + 0.02)]
        for row in tuning.trials
    }
    results = made_results(
        ROWS, TASKS, ALONE, name, tuning=dataclasses.replace(tuning, trials=trials)
    )
    for run in results.runs:
        if run.weighting == "equal":
            run.train_losses = {"topic": [4.0, 2.0, 1.0], "depth": [0.5, 0.4, 0.4]}
        if run.weighting == "upgrad":
            run.conflict = {"share": np.array([0.2, 0.4]), "cosine": np.array([-0.2, 0.1])}
    return results


@pytest.fixture
def pages(tmp_path):
    """A folder of pages with marks, and comparisons on two problems, one also for the worst."""
    for page in ("results.md", "README.md"):
        (tmp_path / page).write_text(f"before\n{MARKS}after\n")
    for name in ("results", "pictures"):
        (tmp_path / name).mkdir()
    for select, name in (("mean", "made"), ("worst", "made"), ("mean", "other")):
        comparison(select, name).write(tmp_path / "runs" / f"{name}_{select}")
    return tmp_path


def run(folder, *comparisons):
    given = [str(folder / "runs" / name) for name in comparisons]
    main([*given, "--docs", str(folder), "--readme", str(folder / "README.md")])


def table(page, name):
    """The rows of a table, as cells."""
    text = page.split(f"<!-- {name}: {MARK} -->")[1].split("<!-- end")[0]
    return [line.strip("|").split("|") for line in text.strip().splitlines() if "---" not in line]


def by_name(page, name):
    """The rows of a table, by their first cell."""
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in table(page, name)}


def text_of(values):
    mean, half = (100 * value for value in mean_interval(values))
    digits = 0 if abs(mean) >= 20 else 1
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def test_pages_are_made_from_records(pages):
    run(pages, "made_mean", "made_worst", "other_mean")
    page = (pages / "results.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("between\nafter\n")
    assert "old" not in page
    rows = by_name(page, "mean")
    assert rows[""] == ["[made](results/made.md)", "[other](results/other.md)"]
    assert set(rows) == {"", *list(ROWS)[1:], "each task alone"}
    arrays = {
        name: {task: np.array(values) for task, values in row.items()}
        for name, row in (ROWS | {"alone": ALONE}).items()
    }

    def changes(name, reference):  # of the depth it is an error
        ours, theirs = arrays[name], arrays[reference]
        return [ours["topic"] / theirs["topic"] - 1, 1 - ours["depth"] / theirs["depth"]]

    change = np.mean(changes("adaptive", "equal"), axis=0)
    assert rows["adaptive"] == [f"{text_of(change)} ▼"] * 2
    assert rows["dwa"] == [text_of(np.mean(changes("dwa", "equal"), axis=0))] * 2
    assert rows["upgrad"] == [f"{text_of(np.mean(changes('upgrad', 'equal'), axis=0))} ▲"] * 2
    # The worst task of each row, against what it reaches alone.
    worst = [np.min(changes(name, "alone"), axis=0) for name in ("adaptive", "equal")]
    rows = by_name(page, "worst")
    assert rows[""] == ["[made](results/made.md)"]
    assert rows["adaptive"] == [f"{text_of(worst[0] - worst[1])} ▼"]
    # Each form of emphasis against three others, those that ran.
    rows = table(page, "emphasis")
    assert [[cell.strip(" `") for cell in row[:3]] for row in rows[1:]] == [
        ["mean", "adaptive", "equal"],
        ["", "", "dwa"],
        ["", "", "uncertainty"],
        ["worst", "adaptive", "equal"],
        ["", "", "dwa"],
        ["", "", "uncertainty"],
    ]
    assert rows[1][3].strip() == f"{text_of(change)} ▼"
    assert rows[3][3].strip() == ""
    # What the learning rate is worth; 0.92 is better than 0.52 by 77 %, a half of which counts.
    (_, row, _) = table(page, "learning rate")
    assert [cell.strip() for cell in row[1:4]] == ["+2.0", "adaptive +40.0", "+38.5"]
    assert row[4].strip() == text_of(change) + " ▼"
    (_, row, _) = table(page, "properties")
    # The metrics of equal weights went from half to the last values in two equal steps: a third
    # of the accuracy was gained, and a third more of the error made.
    assert [cell.strip() for cell in row[1:7]] == [
        *("2", "8", "2.5", "20 to 75 %", "30 %, -0.05"),
        "0.0 %",
    ]


def test_shares_are_also_compared_by_their_errors(pages):
    shares = {"topic": ACCURACY, "role": ACCURACY}
    equal = {"topic": [0.90, 0.91, 0.92], "role": [0.50, 0.51, 0.52]}
    better = {"topic": [0.95, 0.95, 0.96], "role": [0.50, 0.51, 0.52]}
    tuning = made_tuning("equal", "dwa")
    trials = [Trial(0.01, validation={"topic": {"accuracy": [0.9]}}, score=0.0)]
    tuning = dataclasses.replace(tuning, trials={"equal": trials, "dwa": trials})
    made = made_results({"equal": equal, "dwa": better}, shares, None, "shares", tuning=tuning)
    made.write(pages / "runs" / "shares_mean")
    run(pages, "shares_mean", "made_mean")
    rows = by_name((pages / "results.md").read_text(), "errors")
    assert rows[""] == ["[shares](results/shares.md)"]  # the other one has a depth
    change = np.array([0.05 / 0.10, 0.04 / 0.09, 0.04 / 0.08]) / 2
    assert rows["dwa"] == [f"{text_of(change)} ▲"]


def test_published_changes_are_those_of_the_published_metrics():
    data = pathlib.Path(__file__).parents[1] / "data" / "published_metrics.json"
    rows = json.loads(data.read_text())["tables"]["famo"]["rows"]
    higher = {"segmentation": {"mIoU": True, "pixel": True}, "depth": {"a": False, "r": False}}

    def metrics(row):
        values = iter(rows[row]["metrics"])
        return {task: {m: next(values) for m in of_task} for task, of_task in higher.items()}

    names = {"equal": "LS", "dwa": "DWA", "uncertainty": "UW", "nash_mtl": "Nash-MTL"}
    for name, published in PUBLISHED["nyuv2"].items():
        found = 100 * delta_m(metrics(names[name]), metrics("STL"), higher)
        assert published == pytest.approx(found, abs=0.05)


def test_what_was_published_is_beside_what_was_found(pages, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "made", {"upgrad": 12.3})
    run(pages, "made_mean")
    (row,) = table((pages / "results.md").read_text(), "published")[1:]
    found = np.mean(
        [
            np.array(ROWS["upgrad"]["topic"]) / ALONE["topic"] - 1,
            1 - np.array(ROWS["upgrad"]["depth"]) / ALONE["depth"],
        ],
        axis=0,
    )
    mean, half_width = mean_interval(found)
    assert row[1].strip() == "`upgrad`"
    assert row[2].strip() == "+12.3"
    assert row[3].strip() == f"{100 * mean:+.1f} ± {100 * half_width:.1f}"


def test_kept_records_are_enough_and_small(pages):
    run(pages, "made_mean", "made_worst", "other_mean")
    names = ("results.md", "README.md", "results/made.md", "results/other.md")
    before = [(pages / name).read_text() for name in names]
    run(pages)
    assert [(pages / name).read_text() for name in names] == before
    kept = pages / "results" / "made_mean"
    assert [path.name for path in kept.iterdir()] == ["results.json"]
    size = len((kept / "results.json").read_text())
    assert size < len((pages / "runs" / "made_mean" / "results.json").read_text()) / 2
    whole, small = Results.read(pages / "runs" / "made_mean"), Results.read(kept)
    for run_, short in zip(whole.runs, small.runs, strict=True):
        for task, metrics in run_.metrics["test"].items():
            for metric, course in metrics.items():
                found = short.metrics["test"][task][metric]
                assert found[-1] == pytest.approx(course[-1], rel=1e-4)
                assert len(found) == (3 if run_.weighting == "equal" else 1)


def test_kept_records_are_reported_as_any_others(pages, monkeypatch):
    monkeypatch.setattr("mtl_jax.compare.report.FORMATS", ("png",))  # drawing takes time
    run(pages, "made_mean")
    folder = pages / "report"
    report_main(Report((pages / "results" / "made_mean",), folder))
    assert "- adaptive: better in topic by 10" in (folder / "made.md").read_text()
    assert (folder / "made_changes.png").exists()


def test_commands_are_for_any_machine():
    command = "python -m experiments.compare --problem qm9 --runs-dir /a/runs --data-dir /b c"
    found = anywhere(f"{command} --reuse /a/runs/qm9_mean --seeds 10")
    assert found == (
        "python -m experiments.compare --problem qm9 --data-dir DIR c --reuse runs/qm9_mean "
        "--seeds 10"
    )
    assert anywhere("mtl-jax compare --reuse /a/b c/d") == "mtl-jax compare --reuse runs/b runs/d"
    one = "mtl-jax compare m:p --runs_dir='/a b/runs' --data-dir=/c --reuse=/d/e --seeds 3"
    expected = "mtl-jax compare m:p --data-dir DIR --reuse runs/e --seeds 3"
    assert anywhere(f"{one}\n{one}") == f"{expected}\n{expected}"


def test_the_page_of_a_problem(pages):
    run(pages, "made_mean", "made_worst")
    page = (pages / "results" / "made.md").read_text()
    assert page.startswith("# made\n\nThe problem made.\n\n200 train, ")
    assert page.count("mtl-jax compare my:problem") == 2
    for title in ("## Tuned for the mean over the tasks", "## Tuned for the worst task"):
        assert title in page
    assert "- adaptive: better in topic by 10, worse in depth by 0.50; mean -14.4" in page
    headers = [line for line in page.splitlines() if "at the default, %" in line]
    assert len(headers) == 2
    assert all("trials" in line and "epochs" not in line for line in headers)  # these are not kept


def test_what_cannot_be_kept_is_said(pages, capsys):
    def error_of(*comparisons):
        with pytest.raises(SystemExit) as error:
            run(pages, *comparisons)
        assert error.value.code == 2
        return capsys.readouterr().err

    assert "holds no records; name a comparison" in error_of()
    untuned = comparison("mean")
    untuned.tunings = {}
    untuned.write(pages / "runs" / "untuned")
    assert "'made' is not finished, or was not tuned" in error_of("untuned")
    partial = comparison("mean")
    partial.runs.pop()
    partial.write(pages / "runs" / "partial")
    assert "'made' is not finished, or was not tuned" in error_of("partial")
    assert "nowhere holds no results" in error_of("nowhere")


def test_errors_are_of_what_is_better_when_higher():
    """A share that is an error already is left as it is."""
    kinds = {"accuracy": ACCURACY, "error": {"error": MetricInfo(False, unit="%")}}
    rows = {"equal": {"one": [0.1, 0.2]}, "dwa": {"one": [0.2, 0.3]}}
    both = Results.combine(
        [made_results(rows, {"one": kind}, name=name) for name, kind in kinds.items()]
    )
    assert list(of_errors(both).problems) == ["accuracy"]
    assert of_errors(both).of("accuracy")["dwa"][1].metrics["test"]["one"]["accuracy"][-1] == 0.7


def test_what_failed_everywhere_is_not_the_best():
    results = comparison("mean")
    for one in results.runs:
        one.failure = "no finite update in epoch 1" if one.weighting == "constant" else None
    assert properties(Tuned(results, "mean"), "made").best == "upgrad"


def test_a_failed_run_of_equal_weights_is_left_out():
    results, shorter = comparison("mean"), comparison("mean")
    failed = next(run for run in results.runs if run.weighting == "equal")
    failed.failure, failed.train_losses = "it did", {t: [np.nan] for t in failed.train_losses}
    for metrics in failed.metrics["test"].values():
        metrics |= {name: [np.nan] for name in metrics}
    shorter.runs = [run for run in shorter.runs if run.seed != failed.seed]
    shorter.planned = {"made": [(run.weighting, run.seed) for run in shorter.runs]}
    found, expected = (properties(Tuned(r, "mean"), "made") for r in (results, shorter))
    assert (found.first, found.last) == (expected.first, expected.last)
    assert found.worst == pytest.approx(expected.worst)
    analyses = [Tuned(r, "mean").analyses["made"] for r in (results, shorter)]
    assert unfinished(analyses[0]) == pytest.approx(unfinished(analyses[1]))
    assert predictors_figure(Tuned(results, "mean"))
