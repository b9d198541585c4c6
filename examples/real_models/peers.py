"""What else makes a text encoder faster: int8, fewer layers, narrower networks; `examples/peers` compares them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from peft_variator import VariatorConfig, quantize_plugin
from peft_variator.training import DistillationConfig
from peft_variator.training.loss_terms import HiddenStateVariance
from peft_variator.training.losses import hidden_state_loss


__all__ = ["drop_layers", "follow", "kept_layers", "narrow", "quantize", "saved_config", "with_plugin"]


def quantize(model: nn.Module, without: Sequence[str] = (), *, by_channel: bool = False) -> nn.Module:
    """A copy whose Linear layers are int8, with the activations quantised as they come.

    Args:
        model: the model.
        without: what the names of layers end with that stay as they are.
        by_channel: whether each row of a weight has a scale of its own.
    """
    chosen = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f".{name}".endswith(tuple(f".{end}" for end in without))
    }
    with warnings.catch_warnings():
        # torch points to another library for this, which the figures of int8 do not need.
        warnings.simplefilter("ignore", DeprecationWarning)
        kinds = dict.fromkeys(chosen, torch.ao.quantization.per_channel_dynamic_qconfig) if by_channel else chosen
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), kinds, dtype=torch.qint8)


def saved_config(folder: Path, changed: Mapping[str, Any]) -> VariatorConfig:
    """The configuration of a saved plugin, with other values in some of its fields.

    Args:
        folder: of the plugin.
        changed: those fields, none that a weight depends on.

    Raises:
        ValueError: there is no such field, or a field cannot have that value.
    """
    config = VariatorConfig.from_pretrained(str(folder))
    for name, value in changed.items():
        if name not in {field.name for field in fields_of(config)}:
            raise ValueError(f"VariatorConfig has no field {name!r}, which was to be {value!r}.")
        setattr(config, name, value)
    config.__post_init__()
    return config


def with_plugin(
    base: nn.Module,
    folder: Path,
    ratio: int | None,
    *,
    sum_updates: bool = True,
    in_float32: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> PeftModel:
    """A base, as it is or in int8, with a plugin that is quantised alike.

    Args:
        base: the base model, which gets the plugin's layers.
        folder: of the plugin.
        ratio: its compression ratio; `None`: its own.
        sum_updates: whether low-rank updates are summed into W; see `peft_variator.quantize_plugin`.
        in_float32: whether the plugin is left in float32 instead.
        fields: as for `saved_config`.
    """
    model = PeftModel.from_pretrained(base, str(folder), config=saved_config(folder, fields or {})).eval()
    if not in_float32 and any(isinstance(module, torch.ao.nn.quantized.Linear) for module in base.modules()):
        quantize_plugin(model, sum_updates=sum_updates)
    if ratio is not None:
        model.set_compression_ratio(ratio)
    return model


def kept_layers(layers: int, kept: int) -> list[int]:
    """Which of `layers` layers are kept: evenly spaced, the first and the last among them.

    Raises:
        ValueError: `kept` is below 2 or more than there are.
    """
    if not 2 <= kept <= layers:
        raise ValueError(f"kept={kept} has to be between 2 and {layers}, the layers that there are.")
    return [round(place * (layers - 1) / (kept - 1)) for place in range(kept)]


def drop_layers(model: BertModel, kept: int) -> BertModel:
    """A copy with `kept` layers; see `kept_layers`."""
    places = kept_layers(len(model.encoder.layer), kept)
    smaller = copy.deepcopy(model)
    smaller.encoder.layer = nn.ModuleList(smaller.encoder.layer[place] for place in places)
    smaller.config.num_hidden_layers = kept
    return smaller


@torch.no_grad()
def narrow(
    model: BertModel, width: int, neurons: Sequence[Tensor] | None = None, means: Sequence[Tensor] | None = None
) -> BertModel:
    """A copy whose feed-forward networks keep `width` hidden neurons.

    Args:
        model: the base.
        width: of a network.
        neurons: indices of those kept, (width,) a layer; those with the largest ‖w_j‖·‖v_j‖ if `None`.
        means: mean activations, (inner,) a layer: what the others give in the mean goes into the bias.

    Raises:
        ValueError: `width` is below 1 or more than the networks have.
    """
    inner = model.config.intermediate_size
    if not 1 <= width <= inner:
        raise ValueError(f"width={width} has to be between 1 and {inner}, the networks' own.")
    smaller = copy.deepcopy(model)
    for number, layer in enumerate(smaller.encoder.layer):
        up, down = layer.intermediate.dense, layer.output.dense
        norms = up.weight.norm(dim=1) * down.weight.norm(dim=0)
        chosen = norms.topk(width).indices.sort().values if neurons is None else neurons[number]
        if means is not None:
            others = means[number].index_fill(0, chosen, 0.0)
            down.bias = nn.Parameter(down.bias + down.weight @ others)
        up.weight, up.bias = nn.Parameter(up.weight[chosen]), nn.Parameter(up.bias[chosen])
        down.weight = nn.Parameter(down.weight[:, chosen].contiguous())
        up.out_features = down.in_features = width
    smaller.config.intermediate_size = width
    return smaller


class _Follower(Trainer):
    """Trains all weights of a model by the loss that plugins have: errors of hidden states ÷ their variances."""

    def __init__(self, model: BertModel, arguments: DistillationConfig, teacher: BertModel, **fields: Any) -> None:
        super().__init__(model, arguments, **fields)
        self.teacher = teacher.eval()
        self.places = kept_layers(teacher.config.num_hidden_layers, model.config.num_hidden_layers)
        measured = HiddenStateVariance()
        examples = fields["train_dataset"][: arguments.variance_samples]
        for start in range(0, len(examples), 16):
            batch = self.data_collator(examples[start : start + 16])
            measured.update(self._expected(batch), batch["attention_mask"].bool())
        self.variance = measured.result()

    @torch.no_grad()
    def _expected(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        states = self.teacher(**inputs, output_hidden_states=True).hidden_states
        return [states[place + 1] for place in self.places]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model.eval()  # the base has no dropout under a plugin either
        with self.accelerator.autocast():
            expected = self._expected(inputs)
        outputs = model(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"].bool()
        loss = hidden_state_loss(outputs.hidden_states[1:], expected, mask, self.variance).mean()
        return (loss, outputs) if return_outputs else loss


def follow(
    student: BertModel,
    teacher: BertModel,
    arguments: DistillationConfig,
    examples: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """Train all weights of `student`, as a plugin is trained; go on from the last checkpoint that there is.

    Order of the examples, schedule, precision and loss are a plugin's: every layer's hidden states follow those of the
    teacher's layer that it came from.

    Args:
        student: a copy with fewer layers or narrower networks.
        teacher: the base.
        arguments: of the run.
        examples: what is trained on.
        collate: makes batches.

    Returns:
        The lines of the log that have a loss.
    """
    student.requires_grad_(True)  # a plugin that shares the base's weights has frozen them
    trainer = _Follower(student, arguments, teacher, train_dataset=examples, data_collator=collate)
    folder = Path(str(arguments.output_dir))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    student.eval()
    return [line for line in trainer.state.log_history if "loss" in line]
