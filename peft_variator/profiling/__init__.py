"""What a model costs: FLOPs, time, memory; and how a plugin compares with its base."""

from .benchmark import BenchmarkSettings, count_steps, run_benchmark
from .compare import compare
from .environment import describe_environment, was_busy
from .flops import count_flops
from .inputs import make_inputs, make_lengths
from .memory import peak_memory
from .models import build_model, find_task, has_weights, load_config, share_weights
from .plot import check_plotting, save_plot
from .positions import count_positions
from .report import BenchmarkReport, Measurement
from .shapes import SHAPES
from .table import make_table
from .timing import Candidate, Spread, num_threads, speedup, time_alternately


__all__ = [
    "SHAPES",
    "BenchmarkReport",
    "BenchmarkSettings",
    "Candidate",
    "Measurement",
    "Spread",
    "build_model",
    "check_plotting",
    "compare",
    "count_flops",
    "count_positions",
    "count_steps",
    "describe_environment",
    "find_task",
    "has_weights",
    "load_config",
    "make_inputs",
    "make_lengths",
    "make_table",
    "num_threads",
    "peak_memory",
    "run_benchmark",
    "save_plot",
    "share_weights",
    "speedup",
    "time_alternately",
    "was_busy",
]
