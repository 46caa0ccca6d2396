"""How many bytes the model's states take, by the formulas of the ZeRO paper."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelStates:
    """Bytes, of a parameter or of a rank: stored weights, gradients, and what the optimizer keeps."""

    weights: float
    gradients: float
    optimizer: float
