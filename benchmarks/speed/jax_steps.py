"""The steps in JAX, timed: a process of its own."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import mtl_jax
from benchmarks.speed.child import package_versions, progress, serve
from benchmarks.speed.methods import (
    EVERY,
    HELD,
    OPTIMIZER,
    OWN_STEP,
    SECOND,
    Variant,
    variants,
    why_not,
)
from benchmarks.speed.problem import Problem, make_problem
from benchmarks.speed.records import (
    MORE_FORWARD,
    NETWORKS,
    FrameworkResult,
    Measured,
    NetworkResult,
    Request,
)
from benchmarks.speed.timing import Timed, quartiles_of_ratio, time_in_rounds
from mtl_jax._base import Signal, Weighting
from mtl_jax._jacobian import RowsMode
from mtl_jax._tasks import Losses

GROUP = 20
"""Variants that are timed together. All programs of a network at once can be more pieces of code
than a process may have memory maps."""

Step = Callable[[Any, PyTree], tuple[Any, Any]]
"""``step(state, batch) -> (state, value)``."""


def _shared(path: str) -> bool:
    return path.startswith("encoder")


def make_step(problem: Problem, variant: Variant) -> tuple[Step, Any]:
    """A step of this variant, not compiled yet, and the state before the first one."""
    weighting = variant.weighting
    if weighting is None:
        return _plain_step(problem), _fresh((problem.params, OPTIMIZER.init(problem.params)))
    if variant.form in ("losses", OWN_STEP):
        gradient = mtl_jax.value_and_grad(problem.losses_fn, weighting)
    elif variant.form in ("representation", "encoder rows"):
        gradient = mtl_jax.representation_value_and_grad(
            problem.encoder,
            problem.heads,
            cast(Weighting, weighting),
            tasks=problem.tasks,
            gramian="representation" if variant.form == "representation" else "encoder",
            shared=_shared,
        )
    else:
        way = variant.form.partition("=")[2] or "auto"  # also for a second batch
        way = int(way) if way.isdecimal() else cast(RowsMode, way)
        gradient = mtl_jax.value_and_grad(problem.losses_fn, weighting, shared=_shared, rows=way)
    key = jax.random.key(0)
    if variant.form == OWN_STEP:
        states = (
            OPTIMIZER.init(problem.params),
            gradient.init(problem.params, problem.batch, key=key),
        )
        return _own_step(gradient), _fresh((problem.params, *states))
    step = mtl_jax.make_train_step(gradient, OPTIMIZER)
    if variant.form == SECOND:
        return _with_second(step), step.init(problem.params, problem.batch, weighting_key=key)
    return step, step.init(problem.params, problem.batch, weighting_key=key)


def _own_step(gradient: mtl_jax.MultiTaskGradient) -> Step:
    def step(states: Any, batch: PyTree) -> tuple[Any, Any]:
        params, opt_state, weighting_state = states
        value, grads, weighting_state = gradient(params, weighting_state, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, weighting_state), value

    return step


def _with_second(train_step: mtl_jax.TrainStep) -> Step:
    def step(state: Any, batch: PyTree) -> tuple[Any, Any]:
        # In another order, so that XLA does not find both batches to be one.
        return train_step(state, batch, second=(jax.tree.map(lambda leaf: leaf[::-1], batch),))

    return step


def _plain_step(problem: Problem) -> Step:
    def step(state: Any, batch: PyTree) -> tuple[Any, Losses]:
        params, opt_state = state
        (_, losses), gradient = jax.value_and_grad(problem.total, has_aux=True)(params, batch)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses

    return step


def _fresh(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


class Compiled:
    """A compiled step with its state.

    Attributes:
      state: the state after the steps taken so far.
      value: what the last call returned besides.
      seconds: the time that tracing and compiling took.
      temporary_bytes: what the step needs besides its arguments and results; ``None`` where the
        backend does not say.
      timed: the steps, to be timed.
    """

    def __init__(self, problem: Problem, variant: Variant, clock: Callable[[], float]) -> None:
        step, state = make_step(problem, variant)
        scanned = problem.network.scanned

        def steps(state: Any, batch: PyTree) -> tuple[Any, Any]:
            if scanned == 1:
                return step(state, batch)
            return jax.lax.scan(lambda state, _: step(state, batch), state, length=scanned)

        start = clock()
        call = jax.jit(steps, donate_argnums=0).lower(state, problem.batch).compile()
        self.seconds = clock() - start
        memory = call.memory_analysis()
        self.temporary_bytes = None if memory is None else memory.temp_size_in_bytes
        self.state, self.value = call(state, problem.batch)

        def run(number: int) -> None:
            for _ in range(number // scanned):
                self.state, self.value = call(self.state, problem.batch)
            jax.block_until_ready(self.state)

        self.timed = Timed(run, multiple=max(scanned, EVERY if variant.method == HELD else 1))

    @property
    def skipped(self) -> int:
        """The steps that were skipped, and so were cheaper than they should be."""
        return int(self.state.skipped) if isinstance(self.state, mtl_jax.TrainState) else 0


def solver_of(weighting: Weighting, compiled: Compiled, scanned: int) -> Timed:
    """The way from the Gramian that a step found to the weights, alone."""
    value, state = compiled.value, compiled.state.weighting_state
    if scanned > 1:
        value = jax.tree.map(lambda leaf: leaf[-1], value)
    update = jax.jit(weighting.update)
    losses, gramian, state = _fresh((value.losses, value.gramian, state))

    def run(number: int) -> None:
        nonlocal state
        for _ in range(number):
            _, state = update(losses, state, gramian=gramian)
        jax.block_until_ready(state)

    return Timed(run)


class Flops(NamedTuple):
    """Operations of the compiled losses, and of them and their gradient; ``None``: not known."""

    forward: float | None
    step: float | None


def count_flops(problem: Problem) -> Flops:
    """What XLA says of the losses alone and of the losses with their gradient."""

    def flops(function: Callable[..., Any]) -> float | None:
        compiled = jax.jit(function).lower(problem.params, problem.batch).compile()
        return (compiled.cost_analysis() or {}).get("flops")

    return Flops(
        flops(lambda *args: problem.total(*args)[1]),
        flops(jax.value_and_grad(problem.total, has_aux=True)),
    )


def measure_network(name: str, request: Request) -> NetworkResult:
    """Time all variants of one network, in groups: each of them beside the plain step."""
    network = NETWORKS[name]
    problem = make_problem(network)
    reasons = {variant: why_not(variant, network) for variant in variants(request.methods)}
    plain, *others = [variant for variant, reason in reasons.items() if reason is None]
    flops = count_flops(problem)  # also warms up the compiler, which is slower the first time
    measured: list[Measured] = []
    for start in range(0, max(len(others), 1), GROUP):
        group = [plain, *others[start : start + GROUP]]
        progress(f"{name}: variants {start + 1} to {start + len(group) - 1} of {len(others)}")
        measured += measure_group(problem, group, request)[1 if start else 0 :]
        gc.collect()
        jax.clear_caches()  # the programs' memory is free again
    return NetworkResult(
        name,
        measured,
        forward_flops=flops.forward,
        step_flops=flops.step,
        left_out=[f"{variant.label}: {reason}" for variant, reason in reasons.items() if reason],
    )


def measure_group(problem: Problem, group: Sequence[Variant], request: Request) -> list[Measured]:
    """Time variants, the first of which is the plain step."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    compiled = {variant.label: Compiled(problem, variant, clock) for variant in group}
    solvers = {
        f"{variant.label}: solver": solver_of(
            variant.weighting, compiled[variant.label], problem.network.scanned
        )
        for variant in group
        if isinstance(variant.weighting, Weighting)
        and variant.weighting.needs is Signal.GRAMIAN
        and variant.weighting.due is None
        and variant.form in ("representation", "encoder rows", "rows")
    }
    times = time_in_rounds(
        {label: one.timed for label, one in compiled.items()} | solvers,
        rounds=request.rounds,
        seconds=request.seconds,
        clock=clock,
    )
    plain = times[group[0].label]

    def measured(variant: Variant) -> Measured:
        one, mine = compiled[variant.label], times[variant.label]
        solver = times.get(f"{variant.label}: solver")
        notes = [MORE_FORWARD] if getattr(variant.weighting, "observe", None) else []
        notes += [f"{one.skipped} steps skipped"] if one.skipped else []
        return Measured(
            variant.method,
            variant.form,
            step_seconds=float(np.median(mine)),
            ratio=quartiles_of_ratio(mine, plain),
            compile_seconds=one.seconds,
            temporary_bytes=one.temporary_bytes,
            solver_ratio=None if solver is None else quartiles_of_ratio(solver, plain)[1],
            note=", ".join(notes),
        )

    return [measured(variant) for variant in group]


def measure(request: Request) -> FrameworkResult:
    """Time all variants of all networks asked for."""
    on_cpu = jax.default_backend() == "cpu"
    return FrameworkResult(
        device=jax.devices()[0].device_kind,
        clock="CPU time" if on_cpu else "wall-clock time",
        versions=package_versions("jax", "jaxlib", "optax", "flax"),
        networks=[measure_network(name, request) for name in request.networks],
    )


if __name__ == "__main__":
    serve(measure)
