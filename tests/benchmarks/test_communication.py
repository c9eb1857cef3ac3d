"""What travels between devices: the HLO's collectives, and how few of them the weightings add."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import communication
from benchmarks.communication import PLAIN, sent_bytes
from benchmarks.hlo import Collective, collectives, total_bytes

ADAPTIVE, FAMO = "losses: adaptive", "losses: famo (1 more forward pass)"
REPRESENTATION = "Gramian at the representation: upgrad"

# What XLA writes, shortened: a loop of 7 trips in which there is a branch, tuples, started
# operations, and operands with and without their types.
HLO = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%small (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %r.1 = f32[4]{0} all-reduce(%a), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}

%large (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %wide = bf16[3,4]{1,0:T(8,128)} broadcast(%b), dimensions={1}
  %g.1 = bf16[24,4]{1,0} all-gather(%wide), channel_id=2, dimensions={0}
  ROOT %c = f32[4]{0} copy(%b)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[4]{0} get-tuple-element(%p), index=1
  %w = f32[4]{0} conditional(%i, %v, %v), branch_computations={%small, %large}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %w)
}

%condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (q: f32[4], /*index=1*/m: pred[64]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %m = pred[64]{0} parameter(1), metadata={op_name="jit(step)/all-reduce(x)"}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(f32[4]{0} %q), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %s = f32[4]{0} reduce-scatter(f32[32]{0} %done), dimensions={0}, to_apply=%add
  %both = (f32[4]{0}, pred[64]{0}) all-reduce(%s, %m), to_apply=%add
  %k = s32[] constant(0)
  %init = (s32[], f32[4]{0}) tuple(%k, %s)
  %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}
  %out = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %move = f32[4]{0} collective-permute(%out), source_target_pairs={{0,1}}
}
"""


def test_collectives_of_a_text():
    found = collectives(HLO)
    assert found == {
        Collective("all-gather", 4 * 32): 1,
        Collective("reduce-scatter", 4 * 32): 1,
        Collective("all-reduce", 4 * 4 + 64): 1,
        Collective("all-gather", 2 * 24 * 4): 7,  # the branch that sends more, at each trip
        Collective("collective-permute", 4 * 4): 1,
    }
    assert total_bytes(found) == 128 + 128 + 80 + 7 * 192 + 16


def test_texts_that_cannot_be_counted():
    with pytest.raises(ValueError, match="how often is not known"):
        collectives(HLO.replace("known_trip_count", "unknown"))
    with pytest.raises(ValueError, match="not the text of a compiled HLO module"):
        collectives("module @jit_step { }")


def test_collectives_of_a_compiled_program():
    """A sum of 3 numbers over the devices, then 5 of 6 numbers in a loop, of which one is kept."""

    def program(x):
        def body(x, _):
            total = jax.lax.psum(x, "data")
            return x + total, total

        first = jax.lax.psum(x[:3], "data")
        return first, jax.lax.scan(body, x, length=5)[1]

    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.shard_map(program, mesh=mesh, in_specs=P("data"), out_specs=P())
    x = jax.ShapeDtypeStruct((48,), jnp.float32, sharding=jax.NamedSharding(mesh, P("data")))
    text = jax.jit(spread).lower(x).compile().as_text()
    assert collectives(text) == {Collective("all-reduce", 12): 1, Collective("all-reduce", 24): 5}


def test_what_weightings_add_with_explicit_axes():
    tasks, explicit = 7, AxisType.Explicit
    plain = sent_bytes(PLAIN, "data parallel", tasks, explicit)
    assert plain > 4 * 2 * communication.WIDTH**2  # the gradient is in the count
    loss_based = sent_bytes(ADAPTIVE, "data parallel", tasks, explicit)
    assert plain <= loss_based <= plain + 4 * tasks
    gramian = sent_bytes(REPRESENTATION, "data parallel", tasks, explicit)
    assert loss_based < gramian <= loss_based + 4 * tasks**2


def test_what_weightings_add_on_256_devices():
    tasks, arrays = 5, 2 * 2 + 5
    ways = (PLAIN, ADAPTIVE, FAMO, REPRESENTATION)
    found = communication.measure(256, tasks, ways)
    plain, loss_based, observed, gramian = (found[way] for way in ways)
    assert plain[0] > 4 * 2 * communication.WIDTH**2
    assert plain[0] <= loss_based[0] <= plain[0] + 4 * tasks
    assert plain[0] <= observed[0] <= plain[0] + 2 * 4 * tasks
    assert plain[0] < gramian[0] <= plain[0] + 4 * tasks + 4 * tasks**2
    # Where the gradient is in parts, each array has a number that says whether it is finite, which
    # both the transform and the train step ask for.
    check = 2 * 4 * arrays
    assert plain[1] <= loss_based[1] <= plain[1] + 4 * tasks + check
    assert plain[1] < gramian[1] <= plain[1] + 4 * tasks + 4 * tasks**2 + check


def test_command_line(monkeypatch, capsys):
    measured = {way: [1000 + k, 2000 - k] for k, way in enumerate(communication.WAYS)}
    monkeypatch.setattr(communication, "measure", lambda devices, tasks, ways: measured)
    communication.main(["--devices", "4", "--tasks", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == 4
    assert "fsdp, 4 devices" in lines[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells == [[PLAIN, "1,000", "2,000"], [ADAPTIVE, "+1", "-1"]]
    assert lines[-1] == "Made by `python -m benchmarks.communication --devices 4 --tasks 3`"
    with pytest.raises(SystemExit, match="2"):
        communication.main(["--devices", "1"])
    assert "--devices must be at least 2, got 1" in capsys.readouterr().err
