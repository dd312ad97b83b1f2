"""What `Trainer` needs beyond a model's `forward`."""

from .arguments import training_arguments
from .epochs import EpochCallback
from .muon import MuonWithAdamW
from .randomness import RandomnessAnnealing
from .token_files import TokenDataset, TokenWriter

__all__ = [
    "EpochCallback",
    "MuonWithAdamW",
    "RandomnessAnnealing",
    "TokenDataset",
    "TokenWriter",
    "training_arguments",
]
