"""Training of plugins and adapters against a dense teacher."""

from .config import DistillationConfig
from .trainer import DistillationTrainer


__all__ = ["DistillationConfig", "DistillationTrainer"]
