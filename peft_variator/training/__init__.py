"""Training of plugins and adapters against a dense teacher."""

from .config import DistillationConfig
from .load_plugin import load_plugin
from .trainer import DistillationTrainer


__all__ = ["DistillationConfig", "DistillationTrainer", "load_plugin"]
