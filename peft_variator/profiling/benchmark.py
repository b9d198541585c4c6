"""A base and its plugin measured alternately in one run, and one benchmark from its settings to its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..bases import Sparse24Linear, describe_paths
from ..models import Task, build_model, find_task, has_weights, load_config, on_device, share_weights, takes_sound
from ..tuners.variator import VariatorConfig
from ..tuners.variator.quantization import count_parameters, float_corrections
from .flops import count_flops
from .inputs import Lengths, make_inputs, make_lengths, without_padding
from .memory import peak_memory
from .report import BenchmarkReport, Measurement
from .timing import Candidate, check_sampling, describe_environment, num_threads, time_alternately


__all__ = ["BenchmarkSettings", "compare", "count_added_parameters", "count_steps", "find_device", "run_benchmark"]

DEFAULT_LENGTH = 128


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Args:
        model: a name in `SHAPES`, the path of a `config.json`, a folder with a model, or a model's name on the Hub.
        ratios: compression ratios k of the plugin.
        batch: sequences, images or recordings.
        length: tokens of the longest sequence, 128 if `None`; images and sound have none.
        lengths: `"even"`, or `"uneven"` for lengths from a quarter of `length` up, padded.
        dtype: name of a torch dtype, of weights and activations.
        device: name of a torch device.
        rounds: timed samples of each setting, at least 2.
        min_seconds: seconds that a sample takes at least; short calls are repeated.
        threads: CPU threads; `None` leaves torch's choice.
        task: how the model is used; `None` reads it off the architecture.
        random_weights: draw the weights even if there are pretrained ones; they are drawn where there are none.
        with_disabled: measure the plugin switched off, too.
        seed: of weights, plugin and inputs.
        adapter: folder or Hub name of a saved plugin, which is measured instead of a fresh one.

    Raises:
        ValueError: there are fewer than 2 rounds, or `min_seconds` is no time.
    """

    model: str
    ratios: list[int]
    batch: int = 8
    length: int | None = None
    lengths: Lengths = "even"
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 10
    min_seconds: float = 0.2
    threads: int | None = None
    task: Task | None = None
    random_weights: bool = False
    with_disabled: bool = False
    seed: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_sampling(self.rounds, self.min_seconds)  # before a model is built for it

    def resolved(self, config: PreTrainedConfig) -> BenchmarkSettings:
        """These settings with `task` and `length` filled in, and whether weights are drawn.

        Raises:
            ValueError: a length was given for images or sound, the task is not known, or not that of the sound.
        """
        task, fixed = self._task(config), "images, whose number of patches follows from the model's image size"
        if takes_sound(config):
            fixed = "sound, of which each recording is as long as the model takes it"
        found = replace(self, task=task, random_weights=self.random_weights or not has_weights(self.model))
        if task != "vision" and not takes_sound(config):
            return replace(found, length=DEFAULT_LENGTH if self.length is None else self.length)
        if self.length is not None or self.lengths != "even":
            raise ValueError(f"{self.model} takes {fixed}. Leave length and lengths out.")
        return found

    def _task(self, config: PreTrainedConfig) -> Task:
        if not takes_sound(config):
            return self.task or find_task(self.model, config)
        task: Task = "seq2seq" if config.is_encoder_decoder else "encoder"
        if self.task not in (None, task):
            raise ValueError(f"{self.model} takes sound and is measured as {task!r}, not as {self.task!r}.")
        return task


def count_steps(settings: BenchmarkSettings) -> int:
    """How often `run_benchmark` calls its `on_step`."""
    return (1 + len(settings.ratios) + settings.with_disabled) * (1 + settings.rounds)


def run_benchmark(
    settings: BenchmarkSettings, *, command: str = "", on_step: Callable[[], object] = lambda: None
) -> BenchmarkReport:
    """Measure a base and a Variator plugin on it in turn, in this process.

    The plugin's weights are drawn at random, so that no part of it could be skipped for being zero, and have the dtype
    of the base.

    Args:
        settings: what to measure.
        command: how the benchmark was started, for the report.
        on_step: called after each step, `count_steps(settings)` times.

    Raises:
        ValueError: a setting is out of range, or the model cannot take a plugin.
        OSError: the model is not found.
    """
    device, dtype = find_device(settings.device), getattr(torch, settings.dtype)
    config = load_config(settings.model)
    settings = settings.resolved(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with num_threads(settings.threads):
        environment = describe_environment(device)
        inputs = _make_inputs(settings, config, dtype, device, generator)
        base, plugin = _build(settings, config, dtype, device)
        measured = compare(
            base,
            plugin,
            inputs,
            settings.ratios,
            rounds=settings.rounds,
            device=device,
            min_seconds=settings.min_seconds,
            with_disabled=settings.with_disabled,
            on_step=on_step,
        )
    return BenchmarkReport(
        model=settings.model,
        settings=asdict(settings),
        environment=environment,
        command=command,
        base_parameters=_count_dense(base),
        added_parameters=count_added_parameters(plugin),
        base=measured[0],
        plugins=measured[1:],
        packed_layers=describe_paths(base),
        float_corrections=float_corrections(plugin),
    )


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: there is no such device here, or it computes nothing.
    """
    try:
        # A tensor, since torch.device accepts devices that are not there.
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used: {error}") from error
    if device.type == "meta":
        raise ValueError("The device 'meta' computes nothing that could be timed. Name cpu or a GPU.")
    return device


def _make_inputs(
    settings: BenchmarkSettings,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    assert settings.task is not None  # resolved
    length = 1 if settings.length is None else settings.length
    lengths = make_lengths(settings.batch, length, settings.lengths, generator)
    return on_device(make_inputs(config, settings.task, lengths, dtype=dtype, generator=generator), device)


def _build(
    settings: BenchmarkSettings, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, PeftModel]:
    """The base, and a second set of modules over the same weights with a plugin."""
    assert settings.task is not None  # resolved
    torch.manual_seed(settings.seed)
    base = build_model(
        settings.model,
        config,
        settings.task,
        dtype=dtype,
        device=device,
        random_weights=settings.random_weights,
    )
    if settings.adapter is not None:
        from ..training import load_plugin  # only now: a benchmark of a fresh plugin needs no trainer

        return base, load_plugin(share_weights(base), settings.adapter, is_trainable=False).to(dtype).eval()
    # The paper's form, whose cost does not depend on the network's width.
    plugin_config = VariatorConfig(init_weights=False, decompression="bottleneck")
    plugin = get_peft_model(share_weights(base), plugin_config, autocast_adapter_dtype=False)
    return base, plugin.eval()


def count_added_parameters(plugin: PeftModel) -> int:
    """Number of parameters of a model's active adapter, those that nothing trains in a shrunk one included."""
    name = plugin.active_adapters[0]
    state = get_peft_model_state_dict(plugin, adapter_name=name, save_embedding_layers=False)
    sizes = ((key, tensor.numel(), tensor.is_floating_point()) for key, tensor in state.items())
    return count_parameters(sizes, getattr(plugin.peft_config[name], "correction_bits", None))


def _count_dense(model: nn.Module) -> int:
    """Parameters of a model, those of packed layers counted as the weights they stand for."""
    packed = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
    stored = sum(_count([layer.compressed, layer.bitmask, layer.shape]) for layer in packed)
    return _count(model.parameters()) - stored + sum(layer.in_features * layer.out_features for layer in packed)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@contextmanager
def _at_ratio(plugin: PeftModel, ratio: int) -> Iterator[None]:
    plugin.set_compression_ratio(ratio)
    yield


def _candidates(
    base: nn.Module, plugin: PeftModel, inputs: Mapping[str, Any], ratios: Sequence[int], with_disabled: bool
) -> dict[nn.Module, list[Candidate]]:
    """What is measured, by the module that runs it."""
    run = partial(plugin, **inputs)
    switched = [Candidate(f"k = {ratio}", run, partial(_at_ratio, plugin, ratio)) for ratio in ratios]
    if with_disabled:
        switched.append(Candidate("plugin off", run, plugin.disable_adapter))
    return {base: [Candidate("base", partial(base, **inputs))], plugin: switched}


@torch.no_grad()
def compare(
    base: nn.Module,
    plugin: PeftModel,
    inputs: Mapping[str, Any],
    ratios: Sequence[int],
    *,
    rounds: int,
    device: torch.device,
    min_seconds: float = 0.2,
    with_disabled: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """FLOPs, peak memory and time of a base and of a plugin on a second copy of its modules.

    The base is a model that no plugin was ever put into (see `share_weights`), so it is charged for no wrapper.
    Switching the ratio is not part of the measured time. FLOPs and memory are measured first, then all are timed in
    turn.

    Args:
        base: the untouched model.
        plugin: a model with the same weights and a Variator plugin, which has `set_compression_ratio`.
        inputs: keyword arguments of one forward, on `device`.
        ratios: compression ratios k.
        rounds: samples of each, at least 2.
        device: where the models are.
        min_seconds: seconds that a sample takes at least.
        with_disabled: measure the plugin switched off too, to see what its wrappers cost.
        on_step: called once for the FLOPs and memory of each setting and once for each timed sample.

    Returns:
        The base's figures, then those of each ratio, then those of the plugin switched off.

    Raises:
        ValueError: no ratio, one that is given twice or that the plugin refuses, fewer than 2 rounds, or a
            `min_seconds` that is no time.
    """
    check_sampling(rounds, min_seconds)
    if not ratios:
        raise ValueError("ratios is empty; name at least one compression ratio, e.g. 4.")
    groups = _candidates(base, plugin, inputs, ratios, with_disabled)
    is_padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
    facts: dict[str, tuple[int, int | None, int]] = {}
    for model, candidates in groups.items():
        for candidate in candidates:
            with candidate.setting():
                flops = count_flops(model, inputs)
                unpacked = count_flops(model, without_padding(inputs)) if is_padded else None
                facts[candidate.name] = flops, unpacked, peak_memory(candidate.run, device)
            on_step()
    everything = [candidate for candidates in groups.values() for candidate in candidates]
    samples = time_alternately(everything, rounds, device=device, min_seconds=min_seconds, on_sample=on_step)
    return [Measurement(name, *facts[name], seconds) for name, seconds in samples.items()]
