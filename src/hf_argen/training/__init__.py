"""What `Trainer` needs beyond a model's `forward`."""

from .arguments import training_arguments

__all__ = ["training_arguments"]
