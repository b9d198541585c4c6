"""What every run that trains an adapter goes through: settings, trainer, checkpoints, the written result."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import check_new_file, check_new_folder, naming_full_disk, new_folder, write_text
from ..model_files import check_model_name, check_reachable, read_config
from ..models import Task, takes_sound
from ..profiling import build_model, count_positions, find_device, has_weights, load_config
from ..sentence_folder import copy_files
from ..training import DistillationConfig, DistillationTrainer
from ..training.data import IMAGE_SUFFIXES
from ..training.model_card import PluginFacts, RestoredFacts
from .console import Reporter, option_words
from .examples import TrainingData, load_data, warn_about_unreadable
from .publishing import Publishing


__all__ = [
    "RunSettings",
    "check_checkpoints",
    "config_of_checkpoint",
    "load_run_data",
    "load_weights",
    "show_only_a_bar",
    "tell_of_run",
    "train_or_resume",
    "training_arguments",
    "warn_about_little_data",
    "write_adapter",
]

# Fewer held-out examples than these give figures that another draw would change visibly.
ENOUGH_HELD_OUT = 32


@dataclass
class RunSettings:
    """Settings of a run that trains an adapter; each is an option of the command.

    Raises:
        ValueError: a setting is out of range, or the model has no pretrained weights.
        FileExistsError: the output folder exists and is not empty.
    """

    subcommand: ClassVar[str]

    model: str
    data: list[str]
    output: Path
    adapter: str | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 2e-3
    max_length: int = 128
    held_out: int = 128
    text_column: str = "text"
    split: str = "train"
    task: Task | None = None
    bf16: bool = False
    checkpoints: Path | None = None
    device: str | None = None
    seed: int = 0
    license: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it has to be at least 1.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}; it has to be above 0, such as 2e-3.")
        check_model_name(self.model)
        if not has_weights(self.model):
            if Path(self.model).is_dir():
                read_config(Path(self.model))  # which tells of a folder that is none of a model
            raise ValueError(
                f"{self.model} is a configuration without trained weights, so there is nothing to follow or to "
                "restore. Name a model on the Hub or a folder with one."
            )
        check_new_folder(self.output)
        if self.checkpoints is not None and self.output.resolve() in (
            self.checkpoints.resolve(),
            *self.checkpoints.resolve().parents,
        ):
            raise ValueError(
                f"--checkpoints {self.checkpoints} lies in --output {self.output}, which has to be empty until the "
                "run ends. Name another folder."
            )
        _check_device(self.device)
        check_reachable(self.model)  # after what needs no network
        self.push_to_hub = self.publishing.check()

    @cached_property
    def digests(self) -> dict[str, str]:
        """What tells whether the data and the adapter are what they were, so far as they are on this machine."""
        digests = {name: _digest(Path(name)) for name in (*self.data, self.adapter) if name is not None}
        return {name: digest for name, digest in digests.items() if digest is not None}

    @property
    def publishing(self) -> Publishing:
        """Where the adapter is published."""
        return Publishing(self.push_to_hub, self.license)

    @property
    def command(self) -> str:
        """The command line of these settings: what differs from the defaults, but for where it is pushed."""
        words = [*launcher_words(os.environ), self.subcommand, self.model]
        return shlex.join(words + option_words(self, never={"model", "push_to_hub"}))


def launcher_words(environment: Mapping[str, str]) -> list[str]:
    """The start of a command line that runs `peft-variator` on as many processes as this one was started with.

    Args:
        environment: the variables by which launchers tell the processes of each other.
    """
    processes, machines = (environment.get(name, "1") for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE"))
    if "ACCELERATE_MIXED_PRECISION" in environment:
        words = ["accelerate", "launch", "--num_processes", processes]
        words += ["--num_machines", machines] if machines != "1" else []
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            words += ["--use_fsdp", "--fsdp_version", environment.get("FSDP_VERSION", "1")]
            if environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "false":
                words += ["--fsdp_cpu_ram_efficient_loading", "false"]
        elif environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            words += ["--use_deepspeed"]
        elif processes != "1":
            words += ["--multi_gpu"]  # without it, accelerate starts a single process on a machine without GPUs
        precision = environment["ACCELERATE_MIXED_PRECISION"]
        words += ["--mixed_precision", precision] if precision != "no" else []
    elif processes != "1":
        words = ["torchrun", "--nproc-per-node", environment.get("LOCAL_WORLD_SIZE", processes)]
        words += ["--nnodes", machines] if machines != "1" else []
    else:
        return ["peft-variator"]
    return [*words, "-m", "peft_variator"]


SETTINGS_NAME = "run.json"
DIGESTS = "digests"  # of the data and the adapter that a run began with, in that file
# What training goes on from. The Trainer writes its state, trainer_state.json, last.
NEEDED_FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


def check_checkpoints(settings: RunSettings) -> None:
    """Raise unless the folder for checkpoints is free, or holds those of this very run.

    Raises:
        OSError: the folder can't be written to.
        ValueError: the checkpoints are of another run; the message says what differs.
    """
    if settings.checkpoints is None:
        return
    file = settings.checkpoints / SETTINGS_NAME
    check_new_file(file)
    if not _checkpoints(settings):
        return
    if not file.is_file():
        raise ValueError(f"{settings.checkpoints} holds checkpoints of an unknown run. Name another folder.")
    now = _facts(settings)
    before = {"processes": 1, **json.loads(file.read_text(encoding="utf-8"))}  # as before it was written down
    kept, found = before.pop(DIGESTS, {}), settings.digests
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{settings.checkpoints} holds checkpoints of a run with {name}={before.get(name)!r}, and this one "
                f"has {now.get(name)!r}. Go on with the old value, or name another folder for checkpoints."
            )
    for name in sorted(kept.keys() & found.keys()):
        if kept[name] != found[name]:
            raise ValueError(
                f"{name} is not what it was when the checkpoints in {settings.checkpoints} were written. Put it back, "
                "or name another folder for checkpoints."
            )


class _Bar(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def show_only_a_bar(trainer: Trainer) -> None:
    """Have a trainer print no raw dicts of floats: what they say is in training.json."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)


def train_or_resume(trainer: Trainer, settings: RunSettings, reporter: Reporter) -> None:
    """Train, from the last whole checkpoint of the run if there is one; say in their folder which run they are of."""
    last = _last_whole_checkpoint(trainer, settings, reporter)
    if settings.checkpoints is not None and trainer.is_world_process_zero():
        facts = _facts(settings) | {DIGESTS: settings.digests}
        write_text(settings.checkpoints / SETTINGS_NAME, json.dumps(facts, indent=2) + "\n")
    place = str(trainer.args.output_dir)
    with naming_full_disk(place, place):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))


def config_of_checkpoint(settings: RunSettings) -> PeftConfig | None:
    """The configuration of the adapter in a run's newest checkpoint that has one; `None`: there is none.

    All checkpoints of a run have the same, so it need not be the one that training goes on from.
    """
    for folder in _checkpoints(settings):
        if (folder / CONFIG_NAME).is_file() and _is_whole(folder / CONFIG_NAME):
            return PeftConfig.from_pretrained(str(folder))
    return None


def _checkpoints(settings: RunSettings) -> list[Path]:
    """The checkpoints of earlier runs, whole or not, the last one first."""
    folder = settings.checkpoints
    if folder is None or not folder.is_dir():
        return []
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.iterdir() if path.is_dir()}
    found = [path for path, step in steps.items() if step != path.name and step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def _last_whole_checkpoint(trainer: Trainer, settings: RunSettings, reporter: Reporter) -> Path | None:
    """The last checkpoint that was written to its end; those that were not are told of."""
    # Of models that are spread over processes every process writes files of its own.
    is_spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    broken: list[str] = []
    whole = None
    for folder in _checkpoints(settings):
        reason = _why_broken(folder, () if is_spread else NEEDED_FILES)
        if reason is None:
            whole = folder
            break
        broken.append(f"{folder} ({reason})")
    if broken and _is_first_process():
        after = "Starting from the beginning." if whole is None else f"Going on from {whole.name}."
        reporter.warn(f"Passed over {', '.join(broken)}: not written to the end. {after}")
    return whole


def _why_broken(folder: Path, needed: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint of the Trainer, or `None` if it is whole."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    missing = [name for name in (TRAINER_STATE_NAME, *needed) if not fnmatch.filter(files, name)]
    if missing:
        return f"without {missing[0]}"
    damaged = [name for name in files if not _is_whole(folder / name)]
    return f"{damaged[0]} is damaged" if damaged else None


def _is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint can be read to its end."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch's format is that of zip
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (OSError, SafetensorError, ValueError, zipfile.BadZipFile):
        return False
    return True


def _facts(settings: RunSettings) -> dict[str, object]:
    """All settings that decide what is trained, as JSON gives them back."""
    facts = {"subcommand": settings.subcommand, "processes": _processes(), **asdict(settings)}
    if len(settings.data) == 1:
        facts["data"] = settings.data[0]  # as runs wrote it when there was but one
    places = ("output", "checkpoints", "device", "license", "push_to_hub")
    return {name: value for name, value in facts.items() if name not in places}


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of what is in a folder; `None`: it is not on this machine.

    Of images the names and sizes count: there may be many. A folder's other files are those of an adapter.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = sorted(each for each in path.rglob("*") if each.is_file())
    found = [
        (str(each.relative_to(path)), each.stat().st_size if each.suffix.lower() in IMAGE_SUFFIXES else _digest(each))
        for each in files
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def load_weights(name: str, task: Task) -> PreTrainedModel:
    """A model with its trained weights, in single precision on the CPU; the trainer takes it where it runs."""
    cpu = torch.device("cpu")
    return build_model(name, load_config(name), task, dtype=torch.float32, device=cpu, random_weights=False)


def load_run_data(settings: RunSettings, task: Task, reporter: Reporter) -> TrainingData:
    """As much data as all processes of the run need; see [`load_data`]. Images that can't be read are told of.

    Raises:
        ValueError: examples would be longer than the model can read, or it takes sound.
    """
    _check_length(settings)
    if takes_sound(load_config(settings.model)):
        raise ValueError(
            f"{settings.model} takes sound, and only texts and images are read here. Train it in Python with "
            "DistillationTrainer, as examples/real_models does for Whisper."
        )
    batch = settings.batch_size * settings.accumulation * _processes()
    data = load_data(
        settings.model,
        task,
        settings.data,
        column=settings.text_column,
        split=settings.split,
        max_length=settings.max_length,
        wanted=settings.steps * batch,
        held_out=settings.held_out,
        seed=settings.seed,
    )
    if _is_first_process():
        warn_about_unreadable(data.unreadable, len(data.train) + len(data.held_out), reporter)
    return data


@contextmanager
def training_arguments(settings: RunSettings, task: Task, **objective: Any) -> Iterator[DistillationConfig]:
    """The trainer's arguments; what it writes goes to the folder for checkpoints, or to one that goes away.

    Args:
        settings: settings of the run.
        task: how the model is used.
        objective: what is trained for, further fields of `DistillationConfig`.
    """
    on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory(prefix=f"peft-variator-{settings.subcommand}-") as scratch:
        yield DistillationConfig(
            output_dir=str(settings.checkpoints or scratch),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.lr,
            bf16=settings.bf16,
            seed=settings.seed,
            # Sentences beside spans: a batch of both would be padding for the most part.
            train_sampling_strategy="group_by_length" if task == "encoder" else "random",
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no" if settings.checkpoints is None else "steps",
            save_steps=max(1, settings.steps // 10),
            disable_tqdm=not logging.is_progress_bar_enabled(),
            report_to="none",
            dataloader_pin_memory=not on_cpu,
            # Without these, several processes on the CPU would each train for themselves.
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and _processes() > 1 else None,
            **objective,
        )


def warn_about_little_data(settings: RunSettings, held_out: int, reporter: Reporter) -> None:
    """Tell where quality was measured on fewer examples than were asked for, or on too few to be trusted."""
    if held_out < settings.held_out:
        reporter.warn(
            f"Quality was measured on {held_out} held-out examples, not on the {settings.held_out} of --held-out: at "
            "most a tenth of what --data gives is held out. Add data."
        )
    elif held_out < ENOUGH_HELD_OUT:
        reporter.warn(
            f"Quality was measured on {held_out} held-out examples only: another draw would give other figures. "
            f"Raise --held-out to {ENOUGH_HELD_OUT} or more."
        )


Facts = TypeVar("Facts", PluginFacts, RestoredFacts)
Job = TypeVar("Job", bound=RunSettings)


def write_adapter(
    settings: RunSettings,
    model: PeftModel,
    trainer: DistillationTrainer,
    facts: Facts,
    make_card: Callable[[Facts, str | None], ModelCard],
    beside: Mapping[str, Path],
) -> bool:
    """Write an adapter, its card, and `training.json` with the facts and the log: all of it or nothing.

    Args:
        settings: settings of the run.
        model: the base with the adapter.
        trainer: what has trained it; all of its processes have to call this.
        facts: what the card says.
        make_card: makes it, of the facts and the license.
        beside: what sentence-transformers needs to load the folder by itself, from `sentence_files`; empty for others.

    Returns:
        Whether this is the process that has written it.
    """
    adapters = trainer.gather_adapters()
    if not trainer.is_world_process_zero():
        return False
    with new_folder(settings.output) as folder:
        if beside:
            copy_files(beside, folder)
            AutoProcessor.from_pretrained(facts.base).save_pretrained(folder)
        model.save_pretrained(str(folder), state_dict=adapters)
        make_card(facts, settings.license).save(folder / "README.md")
        record = {"facts": asdict(facts), "log": trainer.state.log_history}
        write_text(folder / "training.json", json.dumps(record, indent=2) + "\n")
    return True


def tell_of_run(job: Job, facts: Facts, show: Callable[[Job, Facts, Reporter], None], reporter: Reporter) -> None:
    """Give the figures of a run whose adapter is written to programs and, by `show`, to people; then publish it."""
    reporter.write_json(json.dumps(asdict(facts), indent=2))
    show(job, facts, reporter)
    warn_about_little_data(job, facts.held_out, reporter)
    job.publishing.push(job.output, reporter)


def _processes() -> int:
    """Number of processes that `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_process() -> bool:
    """Whether this process speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _check_length(settings: RunSettings) -> None:
    positions = count_positions(load_config(settings.model))  # of images none, and of relative ones
    if positions is not None and settings.max_length > positions:
        raise ValueError(
            f"--max-length is {settings.max_length}, but {settings.model} has {positions} positions. Lower it."
        )


def _check_device(name: str | None) -> None:
    """Raise unless there is this device, and make it the one that the trainer takes."""
    if name is None or name == "cpu":
        return
    device = find_device(name)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
