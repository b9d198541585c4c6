"""What a model costs: FLOPs, time, memory; and how a plugin compares with its base."""

from ..models import SHAPES, build_model, find_task, has_weights, load_config, share_weights
from .allocation import allocate
from .benchmark import BenchmarkSettings, compare, count_steps, find_device, run_benchmark
from .flops import count_flops
from .inputs import count_positions, make_inputs, make_lengths
from .memory import peak_memory
from .report import BenchmarkReport, Measurement, check_plotting, make_table, save_plot
from .timing import (
    Candidate,
    Spread,
    describe_environment,
    make_training_step,
    num_threads,
    speedup,
    time_alternately,
    was_busy,
)


__all__ = [
    "SHAPES",
    "BenchmarkReport",
    "BenchmarkSettings",
    "Candidate",
    "Measurement",
    "Spread",
    "allocate",
    "build_model",
    "check_plotting",
    "compare",
    "count_flops",
    "count_positions",
    "count_steps",
    "describe_environment",
    "find_device",
    "find_task",
    "has_weights",
    "load_config",
    "make_inputs",
    "make_lengths",
    "make_table",
    "make_training_step",
    "num_threads",
    "peak_memory",
    "run_benchmark",
    "save_plot",
    "share_weights",
    "speedup",
    "time_alternately",
    "was_busy",
]
