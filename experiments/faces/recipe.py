"""The recipe of a run on faces: everything that decides its numbers, except the images."""

from dataclasses import dataclass, replace
from typing import Literal

import optax

from experiments.paper.config import Family, Recipe
from experiments.paper.networks import NETWORKS, Network
from lsoftmax_jax.schedule import LambdaPreset, SelfPaced

# A plateau compares means over PLATEAU_UPDATES losses; a λ below NO_LAM hardly changes the loss.
PLATEAU_UPDATES, NO_LAM = 20, 0.01


@dataclass(frozen=True, kw_only=True)
class FaceRecipe(Recipe):
    """Recipe of a training run on faces; ``drops`` and ``lam`` do not stretch with ``steps``."""

    network: Literal["lfw", "sphere20"] = "lfw"
    """The network of the paper's Table 1, or one like the authors' SphereFace-20."""
    size: tuple[int, int] = (112, 96)
    """Height and width of the images: 112 96, 112 112, or smaller for a trial."""
    family: Family = "l-softmax"
    """Whose margin it is; with a scale, l-softmax of margin 1 is NormFace."""
    margin: int | float = 4
    """m of the family; the L-Softmax's with margin 1 is the ordinary softmax."""
    lam: LambdaPreset = LambdaPreset(base=1000.0, gamma=0.12, power=1.0, minimum=5.0)
    """Annealed: λ at update t is max(minimum, base (1 + gamma t)^-power)."""
    steps: int = 28_000
    """How many updates to make."""
    schedule: Literal["steps", "plateau"] = "steps"
    """Divide the learning rate by ten after the updates in drops, or once the loss is flat."""
    drops: tuple[int, ...] = (16_000, 24_000)
    """Updates after which the schedule "steps" divides the learning rate."""
    patience: int = 2_000
    """With "plateau", divide after this many updates without a lower loss, once λ is low."""
    minimum_images: int = 1
    """Leave out people who have fewer images than this."""
    left_out_fold: int | None = None
    """Leave out everybody in this fold of the pairs (0 is the first), to test this fold later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patience", "minimum_images"):
            self.must(name, ">= 1", lambda value: value >= 1)
        self.must("size", "at least 32 x 32", lambda size: min(size) >= 32)

    @property
    def built_network(self) -> Network:
        """The network for this run's size and width."""
        return replace(NETWORKS[self.network], image=(*self.size, 3)).scaled(self.width)

    @property
    def stretched_drops(self) -> tuple[int, ...]:
        return super().stretched_drops if self.schedule == "steps" else ()

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """With "plateau", the rate falls tenfold where the loss stays within one percent."""
        if self.schedule == "steps":
            return super().optimizer
        lam, patience = self.lam_policy, max(1, self.patience // PLATEAU_UPDATES)
        flat = optax.contrib.reduce_on_plateau(
            patience=patience, rtol=0.01, accumulation_size=PLATEAU_UPDATES
        )
        if not isinstance(lam, SelfPaced):  # while λ falls, the loss may rise
            low = 1.00001 * max(NO_LAM, self.lam.minimum)
            flat = optax.conditionally_transform(flat, lambda step: lam(step) <= low)
        return optax.chain(super().optimizer, flat)
