"""The one place where peft_variator hooks into PEFT: adding methods to its `PeftType` enum and its maps."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .compat import add_peft_type


__all__ = ["register_tuner"]


def register_tuner(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a tuner known to `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter`.

    Calling it again with the same classes does nothing, so modules may be reloaded.

    Args:
        name: lower-case name of the method; `name + "_"` is the prefix of its parameters.
        config_cls: its `PeftConfig`.
        model_cls: its `BaseTuner`.

    Raises:
        ValueError: another class is registered under this name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type(name.upper()))
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif registered.__qualname__ != config_cls.__qualname__ or registered.__module__ != config_cls.__module__:
        raise ValueError(
            f"The PEFT method {name!r} is already registered for {registered!r}, so {config_cls!r} cannot take the "
            "name. Uninstall the other package or rename one of the methods."
        )
