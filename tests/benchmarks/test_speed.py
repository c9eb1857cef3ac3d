import dataclasses
import json

import jax
import pytest

from benchmarks.speed import jax_steps
from benchmarks.speed.__main__ import main
from benchmarks.speed.methods import HELD, Variant, variants, why_not
from benchmarks.speed.promises import kind_of, promises
from benchmarks.speed.records import (
    NETWORKS,
    FrameworkResult,
    Measured,
    Network,
    NetworkResult,
    Request,
    Speed,
)
from benchmarks.speed.report import describe, markdown_report
from benchmarks.speed.timing import Timed, floor_ratio, quartiles_of_ratio, time_in_rounds


def test_the_floor_is_one_forward_and_k_backward_passes():
    assert floor_ratio(10, 30, tasks=1) == 1
    assert floor_ratio(10, 30, tasks=4) == pytest.approx((10 + 4 * 20) / 30)
    # every 5th step computes 4 gradients beside the one that every step needs
    assert floor_ratio(10, 30, tasks=4, every=5) == pytest.approx((30 + 4 * 20 / 5) / 30)


def test_ratios_are_taken_within_a_round():
    # The machine is ten times slower in the last round; the ratio is 2 all the same.
    assert quartiles_of_ratio([2.0, 4.0, 20.0], [1.0, 2.0, 10.0]) == (2, 2, 2)
    assert quartiles_of_ratio([1.0, 2.0, 3.0, 4.0, 9.0], [1.0] * 5) == (2, 3, 4)


def test_every_variant_is_timed_once_a_round_for_long_enough():
    now, calls = 0.0, []

    def step(name, seconds):
        def run(number):
            nonlocal now
            calls.append((name, number))
            now += number * seconds

        return run

    variants = {"fast": Timed(step("fast", 0.01)), "tens": Timed(step("tens", 0.03), multiple=10)}
    times = time_in_rounds(variants, rounds=3, seconds=0.5, clock=lambda: now)
    assert times == {
        "fast": pytest.approx([0.01] * 3),
        "tens": pytest.approx([0.03] * 3),
    }
    rounds = calls[-6:]
    assert [{name for name, _ in rounds[i : i + 2]} for i in (0, 2, 4)] == [{"fast", "tens"}] * 3
    assert {number for name, number in rounds if name == "fast"} == {50}
    assert {number for name, number in rounds if name == "tens"} == {20}


def test_each_method_comes_in_the_forms_that_fit_what_it_reads():
    forms = {}
    for variant in variants():
        forms.setdefault(variant.method, []).append(variant.form)
    assert forms["plain"] == ["plain"]
    assert forms["adaptive"] == ["losses", "own step"]
    assert forms["upgrad"] == ["representation", "encoder rows", "rows"]
    assert forms["mgda"][3:] == [
        "rows=unrolled",
        "rows=map",
        "rows=5",
        "rows=vmap",
        "rows=low_memory",
    ]
    assert forms["moco"] == forms[HELD] == ["rows"]


def test_what_a_network_cannot_do_is_left_out_with_the_reason():
    low_memory = Variant("mgda", "rows=low_memory", None)
    assert why_not(low_memory, NETWORKS["mlp-20"]) is None
    assert "no forward derivative" in why_not(low_memory, NETWORKS["conv-20"])
    assert "needs 3 tasks" in why_not(Variant("krum", "rows", None), NETWORKS["mlp-2"])


def test_a_measurement_from_end_to_end(monkeypatch):
    scanned = dataclasses.replace(NETWORKS["tiny"], scanned=20)
    monkeypatch.setitem(NETWORKS, "tiny-scan", scanned)
    request = Request(("tiny-scan",), ("famo", "krum"), rounds=2, seconds=0.001)
    ours = jax_steps.measure(request)
    (result,) = ours.networks
    forms = [one.form for one in result.measured]
    assert forms == ["plain", "losses", "representation", "encoder rows", "rows"]
    assert result.plain.ratio == (1, 1, 1)
    assert 0 < result.forward_flops < result.step_flops
    for one in result.measured:
        assert one.step_seconds > 0
        assert one.compile_seconds > 0
        assert one.temporary_bytes > 0
        assert "skipped" not in one.note
        assert (one.solver_ratio is not None) == (one.method == "krum")
    assert result.find("famo", "losses").note == "1 more forward pass"

    reread = FrameworkResult.from_json(json.loads(json.dumps(dataclasses.asdict(ours))))
    assert reread.networks[0].find("krum", "rows").form == "rows"
    report = markdown_report(Speed.of_this_machine(ours, None, request, "the command"))
    for text in ("| krum", "20 steps in one call", "the command", "1 more forward"):
        assert text in report


def test_convolutional_steps_can_be_traced(monkeypatch):
    convolutional = Network(2, batch_size=4, inputs=(8, 8, 1), widths=(4,), channels=(2,))
    problem = jax_steps.make_problem(convolutional)
    for variant in variants(("mgda", "moco")):
        if why_not(variant, convolutional) is None:
            step, state = jax_steps.make_step(problem, variant)
            new_state, _ = jax.eval_shape(step, state, problem.batch)
            assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_promises_name_their_worst_measurement():
    def measured(form, ratio, **more):
        return Measured("mgda", form, ratio / 100, (ratio, ratio, ratio), **more)

    plain = measured("plain", 1.0, temporary_bytes=1000)
    rows = measured("rows", 12.0, solver_ratio=0.6)
    low = measured("rows=low_memory", 14.0, temporary_bytes=1300)
    ours = NetworkResult("mlp-20", [plain, rows, low], forward_flops=1.0, step_flops=3.0)
    theirs = NetworkResult("mlp-20", [plain, measured("rows", 16.0)])
    frameworks = [FrameworkResult("cpu", "CPU time", {}, [one]) for one in (ours, theirs)]
    request = Request(("mlp-20",), (), rounds=1, seconds=0.0)
    speed = Speed.of_this_machine(*frameworks, request, "")
    found = {promise.text: promise.found for promise in promises(speed) if promise.found}
    assert found == {
        "full rows, mlp, of the floor": {"mlp-20: mgda, rows": pytest.approx(12 / (41 / 3))},
        "temporary memory of rows=low_memory, K = 20, of the plain step": {
            "mlp-20: mgda, rows=low_memory": 1.3
        },
        "solver, K = 20, of the step": {"mlp-20: mgda, rows": pytest.approx(0.05)},
        "rows, mlp, of TorchJD's time": {"mlp-20: mgda, rows": pytest.approx(0.75)},
    }
    report = markdown_report(speed)
    assert "0.750" in report
    assert "| 0 of 1" in report
    assert kind_of("tiny") == "tiny"
    assert kind_of("tiny-scan") == "tiny-scan"


def test_what_was_left_out_is_said_by_reason():
    one = Measured("mgda", "rows", 0.01, (1.0, 1.0, 1.0))
    few, none = "needs 3 tasks", "there is no forward derivative"
    left_out = [f"krum, rows: {few}", f"krum, encoder rows: {few}", f"trimmed_mean, rows: {few}"]
    left_out.append(f"mgda, rows=low_memory: {none}")
    text = describe(NetworkResult("conv-2", [one], left_out=left_out))
    assert text.endswith(
        f". Left out, {few}: krum, trimmed_mean. Left out, {none}: mgda (rows=low_memory)."
    )


def test_the_peer_of_steps_in_one_call_is_that_of_single_ones():
    theirs = FrameworkResult("cpu", "CPU time", {}, [NetworkResult("tiny", [])])
    ours = FrameworkResult("cpu", "CPU time", {}, [])
    speed = Speed.of_this_machine(ours, theirs, Request((), (), 1, 0.0), "")
    assert speed.peer("tiny-scan") is speed.peer("tiny") is theirs.networks[0]
    assert speed.peer("mlp-2") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "mlp"], "no network 'mlp'. Did you mean 'mlp-"),
        (["--methods", "mgd"], "no method 'mgd'. Did you mean 'mgda'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--peers"], "--peers needs torch and torchjd: pip install torch==2.13.0 and then"),
    ],
)
def test_a_wrong_configuration_is_said_plainly(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """The networks that were measured, by nobody; mlp-20 cannot be."""
    networks = []

    def ask(module, request):
        (name,) = request.networks
        if name == "mlp-20":
            raise RuntimeError("no memory")
        networks.append(name)
        plain = Measured("plain", "plain", 0.001, (1.0, 1.0, 1.0))
        return FrameworkResult("cpu", "CPU time", {"jax": "0"}, [NetworkResult(name, [plain])])

    monkeypatch.setattr("benchmarks.speed.__main__.ask", ask)
    return networks


def test_results_are_written_and_shown(tmp_path, capsys, asked):
    main(["--networks", "tiny", "--out-dir", str(tmp_path)])
    assert "What a step costs" in capsys.readouterr().out
    assert json.loads((tmp_path / "speed.json").read_text())["machine"]["processor"]
    assert "--networks tiny" in (tmp_path / "speed.md").read_text()


def test_what_was_measured_before_a_failure_is_kept(tmp_path, capsys, asked):
    there = ["--out-dir", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit) as error:
        main(["--networks", "tiny", "mlp-20", *there])
    assert error.value.code == 1
    assert "no memory" in capsys.readouterr().err
    main(["--networks", "mlp-2", "tiny", *there])
    assert asked == ["tiny", "mlp-2"]
    page = (tmp_path / "speed.md").read_text()
    assert page.index("## mlp-2") < page.index("## tiny")
    assert f"--networks mlp-2 tiny --out-dir {tmp_path}\n" in page  # without --resume
    with pytest.raises(SystemExit):
        main(["--networks", "mlp-2", "conv-2", "--rounds", "3", *there])
    assert "is of other options" in capsys.readouterr().err
    main(["--networks", "conv-2", "--rounds", "3", *there[:-1]])
    assert json.loads((tmp_path / "speed.json").read_text())["request"]["networks"] == ["conv-2"]
