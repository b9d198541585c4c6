"""The one place where peft_variator hooks into PEFT: adding methods to its `PeftType` enum and its maps."""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


__all__ = ["register_method"]


def _extend_peft_type(name: str) -> None:
    """Add `name` to `PeftType`. PEFT looks methods up by enum member and has no entry point for other packages."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a tuner known to `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter`.

    Calling it again with the same classes does nothing, so modules may be reloaded.

    Args:
        name: lower-case name of the method; `name + "_"` is the prefix of its parameters.
        config_cls: its `PeftConfig`.
        model_cls: its `BaseTuner`.

    Raises:
        ValueError: another class is registered under this name.
    """
    _extend_peft_type(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name.upper()])
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif registered.__qualname__ != config_cls.__qualname__ or registered.__module__ != config_cls.__module__:
        raise ValueError(
            f"The PEFT method {name!r} is already registered for {registered!r}, so {config_cls!r} cannot take the "
            "name. Uninstall the other package or rename one of the methods."
        )
