"""What decides a run's numbers.

``Recipe`` is what a run on small images and a run on faces have in common; ``Config`` adds what
belongs to small images. ``experiments.paper.cells`` has one named configuration for every cell.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from tyro.conf import Suppress

from experiments.paper.data import CLASSES
from experiments.paper.networks import NETWORKS, Network
from lsoftmax_jax import SelfPaced, annealed_lambda, margin_schedule, margins, self_paced
from lsoftmax_jax.margins import check_margin
from lsoftmax_jax.schedule import LambdaPreset
from lsoftmax_jax.training import Schedule

Family = Literal["l-softmax", "a-softmax", "cosface", "arcface"]
Pace = Literal["annealed", "schedule", "lead", "none"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network with a large-margin head is trained.

    ``drops`` and ``lam`` are written for the recipe's own number of updates. A run of other
    ``steps`` stretches both: the learning rate drops at the same fractions of the run, and λ falls
    through the same values.
    """

    seed: int = 0
    """Decides the initial weights, the shuffles and the augmentation."""
    family: Suppress[Family] = "l-softmax"
    """Whose margin it is."""
    margin: int | float = 1
    """m; of the L-Softmax, where 1 is the ordinary softmax, and of the A-Softmax an integer."""
    scale: float | None = None
    """Gives features and columns of the kernel this length; CosFace and ArcFace need it."""
    pace: Pace = "annealed"
    """What decides λ: the constants of lam, margin_schedule, or each example's own lead, which is
    the library's default self_paced. With none λ is 0 from the first update on, as CosFace and
    ArcFace are used."""
    strength: float = 0.8
    """With the pace lead: how much of an example's lead the margin takes, from 0 to 1."""
    lam: LambdaPreset = LambdaPreset(0, 0, 0)
    """Annealed: λ at update t is max(minimum, base (1 + gamma t)^-power); base 0 is none."""
    steps: int = 18_000
    """How many updates to make."""
    written_for: Suppress[int | None] = None
    """The updates that ``drops`` and ``lam`` are written for; by default those of the run."""
    batch: int = 256
    """Images of an update, on all devices together."""
    width: float = 1.0
    """Multiplies every layer's filters and features."""
    dtype: Literal["f32", "bf16"] = "f32"
    """Dtype of the activations; parameters, batch statistics and head are always float32."""

    learning_rate: float = 0.1
    drops: tuple[int, ...] = (12_000, 15_000)
    """Updates after which the learning rate is divided by ten."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Acts on kernels, the head's too; not on biases, batch normalisation or PReLU slopes."""
    bias_rate: float = 1.0
    """Multiplies the learning rate of biases."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            self.must(name, ">= 1", lambda value: value >= 1)
        if self.family.endswith("-softmax"):
            self.must("margin", ">= 1", lambda value: value >= 1)
            self.must("margin", "an integer", lambda value: value % 1 == 0)
            self.must("margin", "at most 1000", lambda value: value <= 1000)
        if self.family in ("cosface", "arcface") and self.scale is None:
            raise ValueError(f"scale must be given with {self.family}, such as 8.0 for ten classes")
        check_margin(self.head_margin)
        self.must("strength", "in [0, 1]", lambda value: 0 <= value <= 1)
        self.must("seed", f"in 0..{2**31 - 1}", lambda value: 0 <= value < 2**31)
        constants = [f"lam.{constant}" for constant in self.lam._fields]
        for name in ("learning_rate", "weight_decay", "bias_rate", *constants):
            self.must(name, ">= 0 and finite", lambda value: 0 <= value < math.inf)
        self.must("momentum", "in [0, 1]", lambda value: 0 <= value <= 1)
        self.must("width", "> 0 and finite", lambda value: 0 < value < math.inf)
        self.must("drops", ">= 0", lambda values: all(drop >= 0 for drop in values))

    def must(self, name: str, be: str, holds: Callable[[Any], bool]) -> None:
        """Raises ValueError, in words, if a field is not what it must be; None may stand for it."""
        value = attrgetter(name)(self)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {be}, got {value}")

    def check_flags(self, named: "Recipe") -> None:
        """Raises ValueError for a flag that this pace would ignore.

        Args:
          named: the recipe without the flags.
        """
        for name, pace in (("lam", "annealed"), ("strength", "lead")):
            if self.pace != pace and getattr(self, name) != getattr(named, name):
                raise ValueError(
                    f"{name} must be left out with pace {self.pace}: only {pace} uses it"
                )

    @property
    def head_margin(self) -> int | margins.Margin:
        """The margin that the head is given."""
        scale: Any = self.scale
        match self.family:
            case "l-softmax" if scale is None:
                return int(self.margin)
            case "l-softmax" if self.margin == 1:
                return margins.NormFace(scale=scale)
            case "l-softmax" | "a-softmax":
                return margins.SphereFace(int(self.margin), scale=scale)
            case "cosface":
                return margins.CosFace(self.margin, scale=scale)
            case "arcface":
                return margins.ArcFace(self.margin, scale=scale)

    @property
    def has_margin(self) -> bool:
        return self.head_margin != 1 and not isinstance(self.head_margin, margins.NormFace)

    def without_margin(self) -> Self:
        """The same recipe with the ordinary softmax."""
        return replace(self, family="l-softmax", margin=1, scale=None)

    @property
    def activation_dtype(self) -> Any:
        return jnp.bfloat16 if self.dtype == "bf16" else jnp.float32

    @property
    def stretch(self) -> float:
        """This run's steps over those that ``drops`` and ``lam`` are written for."""
        return self.steps / (self.written_for or self.steps)

    @property
    def stretched_drops(self) -> tuple[int, ...]:
        return tuple(round(drop * self.stretch) for drop in self.drops)

    @property
    def stretched_lam(self) -> LambdaPreset:
        return self.lam._replace(gamma=self.lam.gamma / self.stretch)

    @property
    def lam_policy(self) -> Schedule | SelfPaced:
        """The λ that `training.train_step` is given."""
        match self.pace:
            case "annealed":
                return annealed_lambda(*self.stretched_lam)
            case "lead":
                return self_paced(self.strength)
            case "schedule":
                polynomial = self.family in ("l-softmax", "a-softmax")
                return margin_schedule(self.steps, margin=int(self.margin) if polynomial else 4)
            case "none":
                return optax.constant_schedule(0.0)
            case _:
                raise ValueError(
                    f"pace must be annealed, schedule, lead or none, got {self.pace!r}: results of "
                    f"the earlier rule self-paced can be read, not continued"
                )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """SGD with momentum, decay on kernels, and a rate of their own for the layers' biases."""

        def is_kernel(params: Any) -> Any:
            return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

        def is_layer_bias(params: Any) -> Any:
            return jax.tree.map_with_path(
                lambda path, _: path[-1].key == "bias" and path[-2].key != "norm", params
            )

        rate = optax.piecewise_constant_schedule(
            self.learning_rate, dict.fromkeys(self.stretched_drops, 0.1)
        )
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, is_kernel),
            optax.masked(optax.scale(self.bias_rate), is_layer_bias),
            optax.sgd(rate, momentum=self.momentum),
        )

    @property
    def ran(self) -> dict[str, Any]:
        """λ and the learning rate's drops as they run, for a result."""
        lam = self.stretched_lam._asdict() if self.pace == "annealed" else None
        return {"pace": self.pace, "lam": lam, "drops": list(self.stretched_drops)}

    def to_json(self) -> dict[str, Any]:
        saved = asdict(self) | {"lam": self.lam._asdict()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in saved.items()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Any:
        """The recipe of a saved one, whose other entries are left alone."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in known.items()
        }
        return cls(**values | {"lam": LambdaPreset(**saved["lam"])})


@dataclass(frozen=True, kw_only=True)
class Config(Recipe):
    """One training run on small images."""

    name: Suppress[str]
    """The configuration that this one is, or departs from."""
    dataset: Suppress[str]
    network: Suppress[str]
    """A row of networks.NETWORKS."""
    hinge: Suppress[bool] = False
    """Multiclass hinge loss in place of the large-margin softmax."""
    written_for: Suppress[int | None] = 18_000

    mean: float | None = None
    """Subtracted from the images; by default the training images' mean image."""
    crop: int = 0
    """Pad by this many pixels, then cut the old size out at random."""
    mirror: bool = False
    """Mirror half of the images."""
    examples: int | None = None
    """Use only this many images of each split, the first ones."""
    validation: bool = False
    """Test on the last training images, 5,000 or a tenth of all, and do not train on them."""
    init: str | None = None
    """Start from the weights of this run, such as mnist-softmax/seed0 in the same --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must("examples", ">= 1", lambda value: value >= 1)
        self.must("crop", ">= 0", lambda value: value >= 0)
        self.must("mean", "finite", math.isfinite)

    @property
    def classes(self) -> int:
        return CLASSES[self.dataset]

    @property
    def built_network(self) -> Network:
        """The network at this run's width."""
        return NETWORKS[self.network].scaled(self.width)
