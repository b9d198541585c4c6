"""The tuner model of SparseLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from ...offloading import refuse_rewriting
from .attaching import attach_masks, layers_of, warn_about_dense
from .config import SparseLoraConfig
from .layer import SparseLoraConv2d, SparseLoraLayer, SparseLoraLinear
from .targets import all_linear, refuse_hidden_targets


__all__ = ["SparseLoraModel"]


class SparseLoraModel(BaseTuner):
    """LoRA under the mask of a pruned model (He et al. 2024, arXiv 2404.02424).

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_variator import SparseLoraConfig

        >>> model = get_peft_model(pruned_model, SparseLoraConfig(r=8))
        >>> ...  # train
        >>> merged = model.merge_and_unload()  # as sparse as before
        ```
    """

    # Not "sparse_lora_": PEFT and others look for prefixes as substrings, and that one contains LoRA's "lora_". The
    # prefix is the name of the method and "_", as transformers' `delete_adapter` expects.
    prefix = "sparse_low_rank_"
    tuner_layer_cls = SparseLoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: SparseLoraConfig, model_config: dict[str, Any]) -> SparseLoraConfig:
        """Without target modules: all linear layers, the default of the paper and no matter what the architecture."""
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return peft_config

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        """Resolve "all-linear" here, before PEFT does; see [`all_linear`]."""
        target_modules = peft_config.target_modules
        if isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = all_linear(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with one warning for all modules in which the mask would mask nothing.

        Raises:
            ValueError: targets lie where PEFT does not look for them, inside of another method's modules.
        """
        refuse_rewriting(model)
        refuse_hidden_targets(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].mask == "weight":
            warn_about_dense(layers_of(model, adapter_name), adapter_name)

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        rank = peft_config.rank_pattern.get(rank_key, peft_config.r)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        if isinstance(target, SparseLoraLayer):
            target.update_layer(adapter_name, peft_config, rank, alpha)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_class = SparseLoraConv2d if isinstance(base_layer, nn.Conv2d) else SparseLoraLinear
        new_module = layer_class(target, current_key)
        new_module.update_layer(adapter_name, peft_config, rank, alpha)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's version reads the `weight` of the base layer, which packed ones don't have, to find its device."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around a forward and then drops the argument: every sample would get the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: SparseLoRA adapters cannot be mixed inside one batch. "
                "Call set_adapter and then the model, once for each of them."
            )
        yield

    def attach_masks(self, masks: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
        """See [`attach_masks`]."""
        attach_masks(self, masks, adapter_name)
