"""What decides a run's numbers.

``Recipe`` is what a run on small images and a run on faces have in common; ``Config`` adds what
belongs to small images. ``experiments.paper.cells`` has one named configuration for every cell.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from tyro.conf import Suppress

from experiments.paper.data import CLASSES
from experiments.paper.networks import NETWORKS, Network
from lsoftmax_jax import SelfPaced, annealed_lambda, margin_schedule, self_paced
from lsoftmax_jax.schedule import LambdaPreset
from lsoftmax_jax.training import Schedule

Pace = Literal["annealed", "schedule", "self-paced"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network with a large-margin head is trained.

    ``drops`` and ``lam`` are written for the recipe's own number of updates. A run of other
    ``steps`` stretches both: the learning rate drops at the same fractions of the run, and λ falls
    through the same values.
    """

    seed: int = 0
    """Decides the initial weights, the shuffles and the augmentation."""
    margin: int = 1
    """m of the L-Softmax; 1 is the ordinary softmax."""
    pace: Pace = "annealed"
    """What decides λ: the constants of lam, the library's margin_schedule, or the batch."""
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
        for name in ("steps", "batch", "margin"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in 0..{2**31 - 1}, got {self.seed}")
        for name in ("learning_rate", "weight_decay", "bias_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")
        for name, value in self.lam._asdict().items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"lam.{name} must be >= 0 and finite, got {value}")
        if not 0 < self.width < float("inf"):
            raise ValueError(f"width must be > 0 and finite, got {self.width}")
        if any(drop < 0 for drop in self.drops):
            raise ValueError(f"drops must be >= 0, got {self.drops}")

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
        """What `training.train_step` takes as λ."""
        match self.pace:
            case "annealed":
                return annealed_lambda(*self.stretched_lam)
            case "self-paced":
                return self_paced()
            case "schedule":
                return margin_schedule(self.steps)

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
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be >= 1, got {self.examples}")
        if self.crop < 0:
            raise ValueError(f"crop must be >= 0, got {self.crop}")
        if self.mean is not None and not abs(self.mean) < float("inf"):
            raise ValueError(f"mean must be finite, got {self.mean}")

    @property
    def classes(self) -> int:
        return CLASSES[self.dataset]

    @property
    def built_network(self) -> Network:
        """The network at this run's width."""
        return NETWORKS[self.network].scaled(self.width)
