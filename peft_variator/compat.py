"""Names of other libraries that are theirs alone, and that we cannot do without: what to look at when a pin is raised.

The upper ends of the versions in setup.cfg follow from this file: before one is raised, every name here is looked up
in the new version's source. `tests/test_compat.py` checks that each exists in the versions installed.

peft:
- `peft.PeftType` as an enum that takes members later (`_member_names_`, `_member_map_`, `_value2member_map_`, names of
  Python's enum): PEFT looks methods up by enum member and has no entry point for other packages. To go when it has.
- `peft.tuners._buffer_dict.BufferDict`: buffers by adapter name, which `nn.Module` lacks.
- `peft.tuners.tuners_utils._maybe_include_all_linear_layers`: PEFT's reading of "all-linear"; it returns a config.
- The frames of `PeftModel.from_pretrained` and `load_adapter`, and `key_mapping` in them: they put an empty
  adapter in before they read its file, and tell nobody that there is one. Others are an error.
  To go when PEFT reads the file first.
- The frames of `PeftModelForCausalLM.__init__` and `PeftModelForSeq2SeqLM.__init__`: they ask the base how it
  generates after the adapter is in, and fail with what is in it. To go when they ask first.
- The frame of `PeftModel.save_pretrained`, and `save_directory` and `is_main_process` in it: it writes the tensors
  over those of an adapter that was there, then the config over its config, and a process that is killed in between
  leaves one's tensors with the other's config. To go when PEFT replaces an adapter whole.
- The frame of `set_peft_model_state_dict`, and `state_dict`, `name` and `model` in it: it raises KeyError for a tensor
  of a module to save that is missing, before a tuner sees the tensors. To go when the tuner sees them first.

transformers:
- `transformers.PreTrainedModel._hf_peft_config_loaded`: `add_adapter` sets it before it injects anything, and leaves
  it set when that fails; to go when transformers takes it back itself.
- The frame of `PreTrainedModel.save_pretrained`, and `save_directory` in it: as PEFT's above, with the config first.
- `_gradient_checkpointing_func` of stacks and blocks, set by `gradient_checkpointing_enable`: what a block is computed
  with, and again with in the backward. Watch `GradientCheckpointingLayer`.
- `Trainer._load_best_model`, overridden: transformers looks for the best adapter where one named "default" is saved,
  whatever the adapter's name. To go when it asks the model where its adapters are.

accelerate:
- `_hf_hook` of a module, set by `accelerate.hooks.add_hook_to_module`: where an offloaded weight is kept. Nothing
  public writes an offloaded weight. Watch `AlignDevicesHook.weights_map`.
- `_old_forward` of a module, set by the same: what its wrapped `forward` calls. A wrapper of ours goes there, behind
  the hook that moves inputs to the module's device, and stays when accelerate replaces or removes its hook.

torch:
- `_version` of a tensor: whether it was written to since. To go when torch tells it in public.
- `torch._C._current_graph_task_id`: whether a forward runs inside of a backward and of which, as
  `torch.utils.checkpoint` asks it; -1 outside.
- `torch._C._autograd._top_saved_tensors_default_hooks`: whether a checkpoint that is not reentrant repeats a forward;
  None if not. From torch 2.8.
- `torch._C._len_torch_dispatch_stack` and `torch._C._functorch.peek_interpreter_stack`: whether someone sees the
  operators of a call, and would miss a product that is none (a FLOP counter, `vmap`).
- `torch.fx.traceback.annotate`, and `preserve_node_meta` without which `torch.export` passes over it: the only notes
  on an exported program that `torch.export.save` writes, as `meta["custom"]` of its nodes. No private names, but
  marked as such that may change; torch 2.8 lacks the first, and its programs have no notes.
- `torch.utils._python_dispatch.TorchDispatchMode`: sees every operator of a call, to count its FLOPs; torch's own
  documentation of extending it sends users here.
- `_load_from_state_dict` of a module: torch's quantised modules raise KeyError for a state dict that has nothing of
  theirs, as that of an adapter. To go when they pass over it, or PEFT over them.
- `nn.TransformerEncoderLayer`'s fused operator, which is taken where no module inside has a hook: no private name,
  but to be looked up all the same.
- `_forward_hooks` and `_forward_pre_hooks` of a module: whether calling it does more than its class says.
- `torch.utils._pytree.tree_leaves`, `tree_map`: the tensors in the arguments of a block, however deep they lie, which
  pruning follows and copies.
- `torch.Tensor._make_wrapper_subclass` and `torch.utils._pytree.tree_map_only`: a tensor that holds others and unpacks
  them when it is computed with, as torch's own documentation of subclasses writes it.
- `torch.utils._python_dispatch.is_traceable_wrapper_subclass`: telling quantized tensors from plain ones.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any, TypeGuard

import peft
import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PeftType, set_peft_model_state_dict
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import PreTrainedModel


__all__ = [
    "FORWARD_SLOTS",
    "BestModelLoader",
    "BufferDict",
    "TorchDispatchMode",
    "adapter_folder_of_save",
    "add_peft_type",
    "annotate_export",
    "are_operators_watched",
    "backward_id",
    "before_upload",
    "check_load_maps",
    "checkpoint_function",
    "export_annotation",
    "forward_slot",
    "in_process_group",
    "include_all_linear_layers",
    "is_plain_linear",
    "is_quantized_tensor",
    "is_saved_before_weights",
    "keep_from_fused_operator",
    "keep_quantized_modules",
    "key_mapping_while_loading",
    "make_wrapper_subclass",
    "mark_without_adapters",
    "needs_generation",
    "offload_hook",
    "repeated_by_reentrant_checkpoint",
    "set_checkpoint_function",
    "tensor_version",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]


def add_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def key_mapping_while_loading() -> Mapping[str, str] | None:
    """How PEFT is going to rename the keys of the file from which it fills an adapter that it is putting in.

    Returns:
        Regular expressions and what takes the place of what they match; `None`: it is not loading one.

    Raises:
        RuntimeError: this PEFT loads adapters in another way, so that nobody could tell.
    """
    loading = {_code_of_loader(PeftModel.from_pretrained), _code_of_loader(PeftModel.load_adapter)}
    frame = _frame_of(loading)
    return None if frame is None else frame.f_locals["key_mapping"] or {}


def _frame_of(codes: Collection[CodeType | None]) -> FrameType | None:
    """The innermost call under way of one of these codes; `None`: there is none."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


def _code_of_loader(loader: Callable[..., Any]) -> CodeType:
    """The code that PEFT loads adapters with, below what other programs may have put around it."""
    code = _code_of(loader)
    if (
        not isinstance(code, CodeType)
        or "key_mapping" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    ):
        raise RuntimeError(
            f"peft {peft.__version__}: {getattr(loader, '__qualname__', loader)} is not the function of the versions "
            "that peft_variator knows, as it has no argument key_mapping. Install one that peft_variator asks for "
            "(`peft-variator doctor` names them), or take back what replaced it."
        )
    return code


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function or method, below what other programs may have put around it."""
    inner = inspect.unwrap(function)
    return getattr(getattr(inner, "__func__", inner), "__code__", None)


def adapter_folder_of_save(adapter_name: str) -> str | None:
    """The folder to which `PeftModel.save_pretrained` is about to write an adapter; `None`: this process does not."""
    frame = _frame_of({_code_of(PeftModel.save_pretrained)})
    if frame is None or not frame.f_locals["is_main_process"]:
        return None
    folder = os.fspath(frame.f_locals["save_directory"])
    return folder if adapter_name == "default" else os.path.join(folder, adapter_name)


def is_saved_before_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether transformers is saving an adapter to a folder: the config that is written now, and then the tensors."""
    frame = _frame_of({_code_of(PreTrainedModel.save_pretrained)})
    return frame is not None and os.fspath(frame.f_locals["save_directory"]) == os.fspath(folder)


def needs_generation() -> bool:
    """Whether an adapter is being put in for a `PeftModel` that takes its base's way to generate, once it is in."""
    kinds = {_code_of(kind.__init__) for kind in (PeftModelForCausalLM, PeftModelForSeq2SeqLM)}
    return _frame_of(kinds) is not None


def check_load_maps(model: nn.Module, adapter_name: str, refuse: Callable[[Any, str, list[str]], None]) -> None:
    """Have `set_peft_model_state_dict` ask for the tensors of modules that are saved whole before it takes them.

    Args:
        model: the base model, with the modules.
        adapter_name: the adapter that they belong to.
        refuse: called with the model that is loaded into, the adapter's name and the keys that are missing.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            vars(module)["adapter_state_dict_load_map"] = _CheckedLoadMap(module, refuse)


class _CheckedLoadMap:
    """Stands in for `adapter_state_dict_load_map` of one module; it can be copied and pickled with the module."""

    def __init__(self, module: Any, refuse: Callable[[Any, str, list[str]], None]) -> None:
        self.module, self.refuse = module, refuse

    def __call__(self, adapter_name: str) -> dict[str, str]:
        names: dict[str, str] = type(self.module).adapter_state_dict_load_map(self.module, adapter_name)
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if caller is None or caller.f_code is not _code_of(set_peft_model_state_dict):
            return names
        given, state = caller.f_locals["peft_model_state_dict"], caller.f_locals["state_dict"]
        prefix = caller.f_locals["name"].removeprefix("_fsdp_wrapped_module.")
        # The state of a whole model has the names already that they are loaded by.
        names = {key: loaded for key, loaded in names.items() if f"{prefix}.{loaded}" not in state}
        missing = [
            f"{prefix}.{key}" for key in names if not (f"{prefix}.{key}" in given and f"{prefix}.{key}" in state)
        ]
        if missing:
            self.refuse(caller.f_locals["model"], adapter_name, missing)
        return names


def keep_from_fused_operator(module: nn.Module) -> None:
    """Have a `nn.TransformerEncoderLayer` around a module call it: its fused operator reads the weights of its maps.

    torch takes that way only where nothing inside has a hook, so this one does nothing.
    """
    module.register_forward_pre_hook(_no_change)


def _no_change(module: nn.Module, args: tuple[Any, ...]) -> None:
    pass


def mark_without_adapters(model: nn.Module) -> None:
    """Take back what transformers' `add_adapter` notes of a model before its first adapter is in it."""
    vars(model).pop("_hf_peft_config_loaded", None)  # of the class it is False


class BestModelLoader:
    """Mix-in before a `transformers.Trainer`: what `load_best_model_at_end` does is a public method, to override."""

    def load_best_model(self) -> None:
        """Take over the weights of the best checkpoint, as transformers does it."""
        super()._load_best_model()  # type: ignore[misc]

    def _load_best_model(self) -> None:
        self.load_best_model()


def before_upload(model: nn.Module, prepare: Callable[[Any, str], None]) -> None:
    """Have `push_to_hub` of a model call `prepare(model, folder)` before it uploads the folder."""
    vars(model)["_upload_modified_files"] = _PreparedUpload(model, prepare)


class _PreparedUpload:
    """Stands in for `_upload_modified_files` of one model; it can be copied and pickled with the model."""

    def __init__(self, model: Any, prepare: Callable[[Any, str], None]) -> None:
        self.model, self.prepare = model, prepare

    def __call__(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        self.prepare(self.model, working_dir)
        return type(self.model)._upload_modified_files(self.model, working_dir, *args, **kwargs)


def offload_hook(module: nn.Module) -> Any | None:
    """accelerate's hook that brings the parameters of a module in, or `None` for a module that has none."""
    return vars(module).get("_hf_hook")


FORWARD_SLOTS = ("forward", "_old_forward")
"""Attributes of a module that may hold what stands in for its class's `forward`."""


def forward_slot(module: nn.Module) -> str:
    """Which of `FORWARD_SLOTS` holds the forward that runs inside of accelerate's hook, if there is one."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


def checkpoint_function(block: nn.Module) -> Callable[..., Any] | None:
    """What transformers computes a block with when it checkpoints, or `None` where checkpointing was never set."""
    return vars(block).get("_gradient_checkpointing_func")


def set_checkpoint_function(block: nn.Module, function: Callable[..., Any]) -> None:
    """Have transformers compute a block with another function when it checkpoints."""
    vars(block)["_gradient_checkpointing_func"] = function


def backward_id() -> int:
    """A number of the backward that runs in this thread, -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def repeated_by_reentrant_checkpoint() -> bool:
    """Whether a forward with gradients is one that a checkpoint with `use_reentrant=True` repeats in a backward."""
    return backward_id() != -1 and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def tensor_version(tensor: Tensor) -> int:
    """A count of a tensor's changes in place; 0 where none is kept."""
    return 0 if tensor.is_inference() else tensor._version


def in_process_group() -> bool:
    """Whether this process is one of a group of torch's; builds without distribution have no such question."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a module is `linear` with its weight and bias and nothing else: no subclass, hook or wrapper."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module)
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def are_operators_watched() -> bool:
    """Whether a dispatch mode, a function transform or forward-mode differentiation is at work in this thread."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@contextmanager
def annotate_export(key: str, value: object) -> Iterator[None]:
    """Have a program that is being exported know something of what runs inside of the block: a value of JSON."""
    annotate = getattr(torch.fx.traceback, "annotate", None)
    with preserve_node_meta(), nullcontext() if annotate is None else annotate({key: value}):
        yield


def export_annotation(program: ExportedProgram | GraphModule, key: str) -> Any | None:
    """What [`annotate_export`] noted of an exported program, or of its `module()`, under a key; `None`: nothing."""
    for node in program.graph.nodes:
        found = node.meta.get("custom", {}).get(key)
        if found is not None:
            return found
    return None


def make_wrapper_subclass(cls: type[Tensor], shape: tuple[int, ...], like: Tensor) -> Any:
    """A tensor of class `cls` without storage of its own, with the dtype and device of `like`."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)


def is_quantized_tensor(tensor: Tensor) -> bool:
    """Whether a tensor that calls itself floating point keeps other tensors inside, as those of torchao do."""
    of_torch = type(tensor).__module__.startswith("torch.")  # DTensor, say
    return is_traceable_wrapper_subclass(tensor) and not of_torch


def keep_quantized_modules(model: nn.Module) -> None:
    """Have torch's quantised modules keep what they have in the next `load_state_dict` without them."""
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            vars(module)["_load_from_state_dict"] = _LoadIfGiven(module)


class _LoadIfGiven:
    """Stands in for `_load_from_state_dict` of one module, once."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        vars(self.module).pop("_load_from_state_dict", None)
        if any(key.startswith(prefix) for key in state_dict):
            self.module._load_from_state_dict(state_dict, prefix, *args, **kwargs)
