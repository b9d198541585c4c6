"""Names of other libraries that are theirs alone, and that we cannot do without: what to look at when a pin is raised.

The upper ends of the versions in setup.cfg follow from this file: before one is raised, every name here is looked up
in the new version's source. `tests/test_compat.py` checks that each exists in the versions installed.

peft:
- `peft.PeftType` as an enum that takes members later (`_member_names_`, `_member_map_`, `_value2member_map_`, names of
  Python's enum): PEFT looks methods up by enum member and has no entry point for other packages. To go when it has.
- `peft.tuners._buffer_dict.BufferDict`: buffers by adapter name, which `nn.Module` lacks.
- `peft.tuners.tuners_utils._maybe_include_all_linear_layers`: PEFT's reading of "all-linear"; it returns a config.

transformers:
- `transformers.PreTrainedModel._hf_peft_config_loaded`: `add_adapter` sets it before it injects anything, and leaves
  it set when that fails; to go when transformers takes it back itself.

accelerate:
- `_hf_hook` of a module, set by `accelerate.hooks.add_hook_to_module`: where an offloaded weight is kept. Nothing
  public writes an offloaded weight. Watch `AlignDevicesHook.weights_map`.

torch:
- `torch._C._current_graph_task_id`: whether a forward runs inside of a backward, as `torch.utils.checkpoint` asks it;
  -1 outside.
- `torch._C._autograd._top_saved_tensors_default_hooks`: whether a checkpoint that is not reentrant repeats a forward;
  None if not.
- `torch.utils._python_dispatch.TorchDispatchMode`: sees every operator of a call, to count its FLOPs; torch's own
  documentation of extending it sends users here.
- `torch.utils._python_dispatch.is_traceable_wrapper_subclass`: telling quantized tensors from plain ones.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


__all__ = [
    "BufferDict",
    "TorchDispatchMode",
    "add_peft_type",
    "include_all_linear_layers",
    "is_quantized_tensor",
    "mark_without_adapters",
    "offload_hook",
    "repeated_by_reentrant_checkpoint",
]


def add_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there.

    Args:
        name: upper-case name of a method.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def mark_without_adapters(model: nn.Module) -> None:
    """Take back what transformers' `add_adapter` notes of a model before its first adapter is in it."""
    if "_hf_peft_config_loaded" in vars(model):
        vars(model)["_hf_peft_config_loaded"] = False


def offload_hook(module: nn.Module) -> Any | None:
    """accelerate's hook that brings the parameters of a module in, or `None` for a module that has none."""
    return vars(module).get("_hf_hook")


def repeated_by_reentrant_checkpoint() -> bool:
    """Whether a forward with gradients is one that a checkpoint with `use_reentrant=True` repeats in a backward."""
    inside_backward = torch._C._current_graph_task_id() != -1
    return inside_backward and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def is_quantized_tensor(tensor: Tensor) -> bool:
    """Whether a tensor that calls itself floating point keeps other tensors inside, as those of torchao do."""
    of_torch = type(tensor).__module__.startswith("torch.")  # DTensor, say
    return is_traceable_wrapper_subclass(tensor) and not of_torch
