"""What `Trainer` needs beyond a model's `forward`."""

from .arguments import training_arguments
from .randomness import RandomnessAnnealing

__all__ = ["RandomnessAnnealing", "training_arguments"]
