"""All methods: for each one its factory and a record of what is known about it.

The tables of the documentation, ``mtl-jax list``, the weightings that a comparison knows by name,
what tuning searches, and the tests that all methods share are made from :data:`METHODS`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import optax
from jaxtyping import ArrayLike, Float

from mtl_jax._base import Aggregator, Weighting
from mtl_jax._search_space import Choice, Range, Space, TaskWeights
from mtl_jax.gradient_aggregators.conflict_free_momentum import conflict_free_momentum
from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.graddrop import graddrop
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean
from mtl_jax.gradient_weightings.excess_mtl import excess_mtl
from mtl_jax.gradient_weightings.lr_annealing import lr_annealing
from mtl_jax.gramian_weightings.aligned_mtl import aligned_mtl
from mtl_jax.gramian_weightings.cagrad import cagrad
from mtl_jax.gramian_weightings.conflict_free import conflict_free
from mtl_jax.gramian_weightings.dual_proj import dual_proj
from mtl_jax.gramian_weightings.fair_grad import fair_grad
from mtl_jax.gramian_weightings.gradnorm import gradnorm
from mtl_jax.gramian_weightings.gradvac import gradvac
from mtl_jax.gramian_weightings.imtl_g import imtl_g
from mtl_jax.gramian_weightings.krum import krum
from mtl_jax.gramian_weightings.mgda import mgda
from mtl_jax.gramian_weightings.nash_mtl import nash_mtl
from mtl_jax.gramian_weightings.norm_balance import norm_balance
from mtl_jax.gramian_weightings.pcgrad import pcgrad
from mtl_jax.gramian_weightings.upgrad import upgrad
from mtl_jax.loss_weightings.achievement import achievement
from mtl_jax.loss_weightings.adaptive import adaptive
from mtl_jax.loss_weightings.causal import causal
from mtl_jax.loss_weightings.constant import constant
from mtl_jax.loss_weightings.cov_weighting import cov_weighting
from mtl_jax.loss_weightings.dwa import dwa
from mtl_jax.loss_weightings.dynamic_task_prioritization import dynamic_task_prioritization
from mtl_jax.loss_weightings.equal import equal
from mtl_jax.loss_weightings.famo import famo
from mtl_jax.loss_weightings.geometric import geometric
from mtl_jax.loss_weightings.go4align import go4align
from mtl_jax.loss_weightings.group_dro import group_dro
from mtl_jax.loss_weightings.imtl_l import imtl_l
from mtl_jax.loss_weightings.random_weighting import random_weighting
from mtl_jax.loss_weightings.relobralo import relobralo
from mtl_jax.loss_weightings.softadapt import softadapt
from mtl_jax.loss_weightings.stch import stch
from mtl_jax.loss_weightings.uncertainty import uncertainty
from mtl_jax.loss_weightings.uw_so import uw_so
from mtl_jax.second_batch_weightings.auto_lambda import auto_lambda
from mtl_jax.second_batch_weightings.modo import modo
from mtl_jax.second_batch_weightings.sdmgrad import sdmgrad

__all__ = [
    "METHODS",
    "Method",
    "RunSettings",
    "SingleTask",
    "achievement",
    "adaptive",
    "aligned_mtl",
    "auto_lambda",
    "cagrad",
    "causal",
    "conflict_free",
    "conflict_free_momentum",
    "constant",
    "cov_weighting",
    "db_mtl",
    "dual_proj",
    "dwa",
    "dynamic_task_prioritization",
    "equal",
    "excess_mtl",
    "fair_grad",
    "famo",
    "geometric",
    "go4align",
    "graddrop",
    "gradnorm",
    "gradvac",
    "group_dro",
    "imtl_g",
    "imtl_l",
    "krum",
    "lr_annealing",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "norm_balance",
    "pcgrad",
    "random_weighting",
    "relobralo",
    "sdmgrad",
    "softadapt",
    "stch",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "uw_so",
]


class SingleTask(NamedTuple):
    """What each task reaches alone: the same network, trained on its loss only.

    Attributes:
      losses: for each task the mean training loss of every epoch, ``float[epochs]``.
      metrics: for each task the validation metric after the last epoch, the first one of several.
        A task without metrics is left out.
      higher_is_better: for each of these tasks whether a higher metric is better.
    """

    losses: Mapping[str, Float[ArrayLike, "epochs"]]
    metrics: Mapping[str, Any]
    higher_is_better: Mapping[str, bool]


class RunSettings(NamedTuple):
    """What the arguments of a method may depend on.

    Attributes:
      steps_per_epoch: training steps in an epoch.
      epochs: epochs of a run.
      optimizer: the network's optimizer, which also trains a weighting's own parameters.
      single_task: what each task reaches alone, with the same seed; ``None`` where that was not
        trained.
      learning_rate: the learning rate that the optimizer was made with, its greatest one.
    """

    steps_per_epoch: int
    epochs: int
    optimizer: optax.GradientTransformation
    single_task: SingleTask | None = None
    learning_rate: float = 1e-3


Reads = Literal[
    "the losses",
    "the losses after the step, too",
    "the Gramian",
    "the task gradients",
    "a second batch",
]
"""What a method reads; from left to right a step costs more, but for the second batch, of which it
depends on the method."""

Domain = Literal["any", "not negative", "positive"]
"""The losses for which a method has an answer."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """What is known about a method, with its default arguments where they matter.

    Attributes:
      factory: the function that makes the weighting or aggregator: the public one of this name.
      reads: ``"the losses"``, ``"the losses after the step, too"``, ``"the Gramian"``, ``"the task
        gradients"`` or ``"a second batch"``.
      effect: in a few words, which task gets more weight, or which direction is taken.
      required: the arguments that a comparison sets, each a function of its
        :class:`RunSettings`: all that have no default (but for the weights of
        :func:`mtl_jax.constant`, which are the user's), and what else depends on a run's length.
      domain: the losses for which it has an answer: ``"any"``, ``"not negative"`` or
        ``"positive"``. For others it returns NaN, and the step is skipped.
      total: what its weights sum to: ``"K"``, the number of present tasks, ``"1"``, or else what
        can be said about them. ``None`` for an aggregator, which has none.
      degree: the power of the gradients' scale by which its weights scale. ``None`` where there is
        none: it reads the losses alone, is an aggregator, or has an optimizer or an epsilon with a
        scale of its own.
      non_conflicting: whether no task's loss rises to first order; a text says under which
        condition.
      draws: whether it draws random numbers, so that its ``init`` needs a key.
      least_tasks: the fewest tasks that it can be given, with the arguments of ``required``.
      sources: its publications, each a label and an address; none for this library's own method.
      search: what tuning searches, by the argument's name. A float may come traced, so that one
        program serves all values: no Python branch of the method may depend on it.
      variants: other settings that a comparison knows by a name of their own.
    """

    factory: Callable[..., Weighting | Aggregator]
    reads: Reads
    effect: str
    required: Mapping[str, Callable[[RunSettings], Any]] = dataclasses.field(default_factory=dict)
    domain: Domain = "any"
    total: str | None
    degree: float | None = None
    non_conflicting: bool | str = False
    draws: bool = False
    least_tasks: int = 1
    sources: tuple[tuple[str, str], ...] = ()
    search: Space = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The factory's name."""
        return self.factory.__name__

    @property
    def call(self) -> str:
        """The shortest call, with the names of the arguments that have no default."""
        parameters = inspect.signature(self.factory).parameters.values()
        without = (one.name for one in parameters if one.default is inspect.Parameter.empty)
        return f"{self.name}({', '.join(without)})"

    @property
    def makes(self) -> Mapping[str, Callable[..., Weighting | Aggregator]]:
        """``make`` for the method and for its variants, by name."""
        variants = {
            name: functools.partial(self.make, **own) for name, own in self.variants.items()
        }
        return {self.name: self.make, **variants}

    @property
    def spaces(self) -> Mapping[str, Space]:
        """What tuning searches for it and for its variants, by name, less what a variant sets."""
        others = {
            variant: {key: one for key, one in self.search.items() if key not in own}
            for variant, own in self.variants.items()
        }
        return {self.name: self.search, **others}

    def make(self, settings: RunSettings, **own: Any) -> Weighting | Aggregator:
        """Make the weighting or aggregator for a run.

        Args:
          settings: what the arguments of ``required`` follow from.
          **own: further arguments of the factory; they go before those of ``required``.

        Returns:
          The weighting or aggregator.

        Raises:
          TypeError: if an argument without a default is missing, which is so for
            :func:`mtl_jax.constant` without ``weights``.

        Example:
          >>> import optax
          >>> from mtl_jax import METHODS, RunSettings
          >>> settings = RunSettings(steps_per_epoch=100, epochs=20, optimizer=optax.adam(1e-3))
          >>> weighting = METHODS["dwa"].make(settings, temperature=1.0)  # window=100
          >>> METHODS["dwa"].call
          'dwa(window)'
        """
        required = {name: value(settings) for name, value in self.required.items()}
        return self.factory(**(required | own))


def _epoch(settings: RunSettings) -> int:
    return settings.steps_per_epoch


def _fifth(settings: RunSettings) -> int:
    return max(1, settings.epochs // 5) * settings.steps_per_epoch


def _optimizer(settings: RunSettings) -> optax.GradientTransformation:
    return settings.optimizer


def _learning_rate(settings: RunSettings) -> float:
    return settings.learning_rate


_RECORDS = (
    Method(
        factory=equal,
        reads="the losses",
        effect="nothing",
        total="K",
        sources=(("Kurin 2022", "https://arxiv.org/abs/2201.04122"),),
    ),
    Method(
        factory=constant,
        reads="the losses",
        effect="what you say",
        total="as given",
        sources=(("Xin 2022", "https://arxiv.org/abs/2209.11379"),),
        search={"weights": TaskWeights()},
    ),
    Method(
        factory=adaptive,
        reads="the losses",
        effect="the task with the higher loss",
        domain="not negative",
        total="K",
        search={
            "emphasis": Range(1.0, 0.1, 4.0, log=True),
            "rule": Choice("proportional", "softmax"),
            "decay": Choice(0.0, 0.9, 0.99),
        },
        variants={
            "adaptive_softmax": {"rule": "softmax"},
            "adaptive_initial": {"relative_to": "initial"},
        },
    ),
    Method(
        factory=group_dro,
        reads="the losses",
        effect="the task whose losses add up to most",
        total="K",
        sources=(
            ("Sagawa 2020", "https://arxiv.org/abs/1911.08731"),
            ("Xie 2023", "https://arxiv.org/abs/2305.10429"),
        ),
        search={"step_size": Range(0.01, 0.001, 1.0, log=True), "normalize": Choice(False, True)},
    ),
    Method(
        factory=dwa,
        reads="the losses",
        effect="the loss that falls more slowly",
        required={"window": _epoch},
        total="K",
        sources=(("Liu 2019", "https://arxiv.org/abs/1803.10704"),),
        search={"temperature": Range(2.0, 0.2, 20.0, log=True)},
    ),
    Method(
        factory=uncertainty,
        reads="the losses",
        effect="the lower learned variance",
        required={"optimizer": _optimizer},
        total="free",
        sources=(("Kendall 2018", "https://arxiv.org/abs/1705.07115"),),
        search={
            "initial_log_variance": Range(0.0, -3.0, 3.0),
            "form": Choice("kendall", "half", "revised"),
        },
    ),
    Method(
        factory=uw_so,
        reads="the losses",
        effect="the lower loss",
        required={"temperature": lambda settings: 1.0},
        domain="positive",
        total="1",
        sources=(("Kirchdorfer 2024", "https://arxiv.org/abs/2408.07985"),),
        search={"temperature": Range(1.0, 0.1, 100.0, log=True)},
    ),
    Method(
        factory=random_weighting,
        reads="the losses",
        effect="chance",
        total="1",
        draws=True,
        sources=(("Lin 2022", "https://arxiv.org/abs/2111.10603"),),
        search={"distribution": Choice("normal", "dirichlet")},
    ),
    Method(
        factory=geometric,
        reads="the losses",
        effect="the lower loss: geometric mean",
        domain="positive",
        total="free",
        sources=(("Chennupati 2019", "https://arxiv.org/abs/1904.08492"),),
    ),
    Method(
        factory=go4align,
        reads="the losses",
        effect="the lower loss, alike within a group of tasks",
        domain="positive",
        total="free",
        sources=(("Shen 2024", "https://arxiv.org/abs/2404.06486"),),
        search={
            "groups": Choice(2, 1, 3, 5),
            "step_size": Range(1e-4, 1e-6, 1.0, log=True),
        },
    ),
    Method(
        factory=dynamic_task_prioritization,
        reads="the losses",
        effect="the task that performs worse",
        required={"gamma": lambda settings: 1.0},
        domain="not negative",
        total="free",
        sources=(
            (
                "Guo 2018",
                "https://openaccess.thecvf.com/content_ECCV_2018/html/"
                "Michelle_Guo_Focus_on_the_ECCV_2018_paper.html",
            ),
        ),
        search={"gamma": Range(1.0, 0.0, 5.0), "decay": Choice(0.0, 0.9, 0.99)},
        variants={"dynamic_task_prioritization_metrics": {"performance": "metrics"}},
    ),
    Method(
        factory=achievement,
        reads="the losses",
        effect="the task whose validation metric is furthest behind that alone",
        domain="positive",
        total="free",
        sources=(
            (
                "Yun 2023",
                "https://openaccess.thecvf.com/content/ICCV2023/html/"
                "Yun_Achievement-Based_Training_Progress_Balancing_for_Multi-Task_Learning_"
                "ICCV_2023_paper.html",
            ),
        ),
        search={"gamma": Range(0.5, 0.1, 4.0, log=True), "margin": Choice(0.15, 0.05)},
    ),
    Method(
        factory=cov_weighting,
        reads="the losses",
        effect="the loss that still varies",
        domain="not negative",
        total="1",
        sources=(("Groenendijk 2021", "https://arxiv.org/abs/2009.01717"),),
        search={"decay": Choice(None, 0.9, 0.99)},
    ),
    Method(
        factory=softadapt,
        reads="the losses",
        effect="the loss that rises, or falls least",
        required={"window": _epoch},
        total="1",
        sources=(("Heydari 2019", "https://arxiv.org/abs/1912.12355"),),
        search={
            "beta": Range(0.1, 0.01, 10.0, log=True),
            "variant": Choice("original", "normalized", "loss_weighted"),
        },
    ),
    Method(
        factory=relobralo,
        reads="the losses",
        effect="the least fall since the last step",
        total="K",
        sources=(("Bischof 2021", "https://arxiv.org/abs/2110.09813"),),
        search={
            "alpha": Choice(0.999, 0.99, 0.9),
            "temperature": Range(1.0, 0.01, 10.0, log=True),
            "rho": Choice(1.0, 0.999, 0.99, 0.9),
        },
    ),
    Method(
        factory=imtl_l,
        reads="the losses",
        effect="scaled losses equal to 1, learned",
        required={"optimizer": _optimizer},
        total="free",
        sources=(("Liu 2021", "https://openreview.net/forum?id=IMPnRXEWpvr"),),
    ),
    Method(
        factory=stch,
        reads="the losses",
        effect="the worst, relative to a nadir",
        required={"warmup": _fifth, "window": _epoch},
        domain="positive",
        total="free",
        sources=(("Lin 2024", "https://arxiv.org/abs/2402.19078"),),
        search={"mu": Range(1.0, 0.1, 10.0, log=True)},
    ),
    Method(
        factory=causal,
        reads="the losses",
        effect="the first, until its loss is small; then the next",
        required={"order": lambda settings: None},
        domain="not negative",
        total="1 for the first, less for others",
        sources=(("Wang 2022", "https://arxiv.org/abs/2203.07404"),),
        search={"tolerance": Range(1.0, 0.01, 100.0, log=True)},
    ),
    Method(
        factory=famo,
        reads="the losses after the step, too",
        effect="the loss that fell less in the step",
        domain="not negative",
        total="1",
        sources=(("Liu 2023", "https://arxiv.org/abs/2306.03792"),),
        search={
            "learning_rate": Range(0.025, 0.001, 0.5, log=True),
            "weight_decay": Range(1e-3, 1e-5, 0.1, log=True),
        },
    ),
    Method(
        factory=gradnorm,
        reads="the Gramian",
        effect="learned: weighted gradients of similar norm",
        required={"optimizer": _optimizer},
        domain="positive",
        total="K",
        sources=(("Chen 2018", "https://arxiv.org/abs/1711.02257"),),
        search={"alpha": Range(1.5, 0.1, 3.0)},
    ),
    Method(
        factory=norm_balance,
        reads="the Gramian",
        effect="weighted gradients of equal norm, averaged over time",
        total="inverse to the gradients' norms",
        degree=0,
        sources=(
            ("Wang 2020", "https://arxiv.org/abs/2007.14527"),
            ("Wang 2023", "https://arxiv.org/abs/2308.08468"),
            ("Esser 2021", "https://arxiv.org/abs/2012.09841"),
        ),
        search={"momentum": Choice(0.9, 0.0, 0.99)},
    ),
    Method(
        factory=mgda,
        reads="the Gramian",
        effect="the shortest in the convex hull",
        total="1",
        degree=0,
        non_conflicting=True,
        sources=(
            ("Désidéri 2012", "https://doi.org/10.1016/j.crma.2012.03.014"),
            ("Sener 2018", "https://arxiv.org/abs/1810.04650"),
        ),
        search={"normalization": Choice(None, "l2", "loss", "loss+")},
    ),
    Method(
        factory=cagrad,
        reads="the Gramian",
        effect="near the mean, best for the worst-served task",
        total="1/K each and more",
        degree=0,
        sources=(("Liu 2021", "https://arxiv.org/abs/2110.14048"),),
        search={"c": Range(0.5, 0.1, 0.9)},
    ),
    Method(
        factory=pcgrad,
        reads="the Gramian",
        effect="each gradient without its conflicts, summed; random order",
        total="at least 1 each",
        degree=0,
        draws=True,
        sources=(("Yu 2020", "https://arxiv.org/abs/2001.06782"),),
    ),
    Method(
        factory=gradvac,
        reads="the Gramian",
        effect="each gradient turned to the usual angles, summed; random order",
        total="at least 1 each",
        degree=0,
        draws=True,
        sources=(("Wang 2021", "https://arxiv.org/abs/2010.05874"),),
        search={"beta": Range(0.5, 0.01, 1.0, log=True)},
    ),
    Method(
        factory=nash_mtl,
        reads="the Gramian",
        effect="the Nash bargaining solution",
        total="inverse to the gradients' norms",
        degree=-1,
        non_conflicting=True,
        sources=(("Navon 2022", "https://arxiv.org/abs/2202.01017"),),
        search={"max_norm": Choice(None, 1.0)},
    ),
    Method(
        factory=fair_grad,
        reads="the Gramian",
        effect="the alpha-fair solution",
        total="power of the gradients' norms",
        degree=-1,  # -2 alpha / (1 + alpha)
        non_conflicting=True,
        sources=(("Ban 2024", "https://arxiv.org/abs/2402.15638"),),
        search={"alpha": Range(1.0, 0.5, 10.0, log=True)},
    ),
    Method(
        factory=imtl_g,
        reads="the Gramian",
        effect="equal projections on all gradients",
        total="sum to 1, some may be negative",
        degree=0,
        sources=(("Liu 2021", "https://openreview.net/forum?id=IMPnRXEWpvr"),),
    ),
    Method(
        factory=aligned_mtl,
        reads="the Gramian",
        effect="the mean of the gradients made orthogonal",
        total="free, some may be negative",
        degree=0,
        sources=(("Senushkin 2023", "https://arxiv.org/abs/2305.19000"),),
        search={"scale": Choice("min", "median", "rmse")},
    ),
    Method(
        factory=upgrad,
        reads="the Gramian",
        effect="each gradient projected to harm none, mean",
        total="1/K each and more",
        degree=0,
        non_conflicting=True,
        sources=(("Quinton 2024", "https://arxiv.org/abs/2406.16232"),),
    ),
    Method(
        factory=dual_proj,
        reads="the Gramian",
        effect="the mean projected to harm none",
        total="1/K each and more",
        degree=0,
        non_conflicting=True,
        sources=(("Lopez-Paz 2017", "https://arxiv.org/abs/1706.08840"),),
    ),
    Method(
        factory=conflict_free,
        reads="the Gramian",
        effect="ConFIG: the same acute angle to all gradients",
        total="free, some may be negative",
        degree=0,
        non_conflicting="if independent",
        sources=(("Liu 2024", "https://arxiv.org/abs/2408.11104"),),
    ),
    Method(
        factory=krum,
        reads="the Gramian",
        effect="the gradient nearest to its neighbours",
        required={"byzantine": lambda settings: 0},
        total="1",
        degree=0,
        least_tasks=3,
        sources=(("Blanchard 2017", "https://arxiv.org/abs/1703.02757"),),
        search={"selected": Choice(1, 2, 3)},
    ),
    Method(
        factory=graddrop,
        reads="the task gradients",
        effect="the gradients of one sign, chosen at random",
        total=None,
        draws=True,
        sources=(("Chen 2020", "https://arxiv.org/abs/2010.06808"),),
        search={"leak": Range(0.0, 0.0, 0.9)},
    ),
    Method(
        factory=trimmed_mean,
        reads="the task gradients",
        effect="the mean without the largest and the smallest",
        required={"trim": lambda settings: 1},
        total=None,
        least_tasks=3,
        sources=(("Yin 2018", "https://arxiv.org/abs/1803.01498"),),
    ),
    Method(
        factory=moco,
        reads="the task gradients",
        effect="tracked gradients, weights learned towards their shortest sum",
        domain="not negative",
        total=None,
        sources=(("Fernando 2023", "https://openreview.net/forum?id=dLAYGdKTi2"),),
        search={
            "beta": Range(0.5, 0.05, 1.0, log=True),
            "gamma": Range(0.1, 0.01, 10.0, log=True),
        },
    ),
    Method(
        factory=conflict_free_momentum,
        reads="the task gradients",
        effect="M-ConFIG: the same acute angle to averaged gradients, one new each step",
        total=None,
        sources=(("Liu 2024", "https://arxiv.org/abs/2408.11104"),),
        search={"decay": Choice(0.9, 0.0, 0.99)},
    ),
    Method(
        factory=excess_mtl,
        reads="the task gradients",
        effect="the task estimated to be furthest from its optimum",
        total="K",
        sources=(("He 2024", "https://arxiv.org/abs/2402.02009"),),
        search={"step_size": Range(0.01, 0.001, 1.0, log=True)},
    ),
    Method(
        factory=lr_annealing,
        reads="the task gradients",
        effect="the small mean entry, against the largest of a reference task",
        required={"reference": lambda settings: None},
        total="1 for the reference",
        sources=(("Wang 2020", "https://arxiv.org/abs/2001.04536"),),
        search={
            "alpha": Range(0.1, 0.01, 1.0, log=True),
            "statistic": Choice("max", "mean"),
        },
    ),
    Method(
        factory=db_mtl,
        reads="the task gradients",
        effect="gradients of the log losses, all as long as the longest",
        domain="not negative",
        total=None,
        sources=(("Lin 2023", "https://arxiv.org/abs/2308.12029"),),
        search={"beta": Range(0.9, 0.0, 0.99), "beta_sigma": Choice(0.0, 0.5)},
    ),
    Method(
        factory=modo,
        reads="a second batch",
        effect="steps towards the shortest direction",
        total="1",
        sources=(("Chen 2023", "https://arxiv.org/abs/2305.20057"),),
        search={
            "gamma": Range(0.001, 1e-4, 10.0, log=True),
            "rho": Choice(0.1, 0.0, 0.01, 1.0),
        },
    ),
    Method(
        factory=auto_lambda,
        reads="a second batch",
        effect="the task whose step lowers the primary losses",
        required={
            "optimizer": lambda settings: optax.adam(1e-4),
            "learning_rate": _learning_rate,
        },
        total="free, some may be negative",
        sources=(("Liu 2022", "https://arxiv.org/abs/2202.03091"),),
        search={"initial": Range(0.1, 0.01, 10.0, log=True)},
    ),
    Method(
        factory=sdmgrad,
        reads="a second batch",
        effect="the shortest direction near the mean gradient",
        total="1",
        sources=(("Xiao 2023", "https://arxiv.org/abs/2305.18409"),),
        search={
            "regularization": Range(0.3, 0.01, 10.0, log=True),
            "learning_rate": Choice(10.0, 1.0, 0.1),
        },
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _RECORDS}
"""All methods by name, those that read the same side by side, the cheapest first.

Arguments without a default are what a comparison begins with: windows are one epoch; the weightings
that learn take the network's optimizer; ``stch`` warms up for a fifth of the epochs; ``uw_so`` has
the temperature 1, ``causal`` the order of the losses, and ``lr_annealing`` the first of them as its
reference. ``krum`` and ``trimmed_mean`` take the smallest numbers that do something: they need
three tasks. The ranges of ``search`` hold the published default and the values that publications
chose from, and reach as far beyond as may make sense."""

MAKES = {name: make for method in METHODS.values() for name, make in method.makes.items()}
"""What makes each weighting in a run, by its name: a method can have several forms."""
