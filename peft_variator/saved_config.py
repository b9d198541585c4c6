"""The configurations of adapters: every field checked, wherever it was set, and files that appear whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftType, TaskType
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .adapter_card import CardContent, write_card
from .compat import is_saved_before_weights
from .field_types import check_field_types, check_regex, shown
from .files import replacing


__all__ = ["NamedConfigs", "SavedConfig", "UnknownAdapterError"]


class UnknownAdapterError(KeyError, ValueError):
    """A model has no adapter of that name."""

    def __str__(self) -> str:  # KeyError shows a repr
        return str(self.args[0])


class NamedConfigs(dict[str, PeftConfig]):
    """The configs of a model's adapters by name; asked for one that is not there, it says which there are."""

    def __missing__(self, adapter_name: str) -> PeftConfig:
        raise UnknownAdapterError(f"There is no adapter {adapter_name!r}. The adapters are {sorted(self)}.")


class SavedConfig(PeftConfig):
    """A config that knows whether it was read from a file, and from which folder where PEFT told it."""

    method: ClassVar[str]
    """PEFT's name of the method."""
    target_modules: set[str] | str | None
    exclude_modules: set[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    was_saved: bool
    source: str | None
    download: tuple[str, dict[str, Any]] | None
    """Repository that it was read from, and `subfolder`, `revision` and `cache_dir` of it; `None`: a folder."""

    def __post_init__(self) -> None:
        self.was_saved = self.peft_version is not None  # PEFT fills it in where it is new
        self.source = self.download = None
        self.check()
        self.peft_type = PeftType(self.method)
        super().__post_init__()

    def check(self) -> None:
        """Check every field, as when the config was made: fields may have been set since.

        Raises:
            ValueError: a field has a value that is not allowed; the message names it and what is.
        """
        check_field_types(self)
        self._check_names()
        self._check_modules()

    def _check_names(self) -> None:
        """What PEFT's own fields hold, which it checks without naming them, or not at all."""
        if self.peft_type not in (None, self.method):
            raise _other_method(self.peft_type, type(self))
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise ValueError(  # PEFT's words, and the field
                f"Invalid task type: {shown(self.task_type)}. task_type has to be one of "
                f"{', '.join(map(repr, tasks))}, or None."
            )
        for key, value in (self.auto_mapping or {}).items():
            if not isinstance(key, str) or not (value is None or isinstance(value, str)):
                raise ValueError(
                    f"auto_mapping={shown(self.auto_mapping)} has to map texts to texts: 'base_model_class' and "
                    "'parent_library' to the names of the base's class and of its module."
                )

    def _check_modules(self) -> None:
        """What names modules and layers, which PEFT reads as it is once the adapter is put in."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else sorted(value or ())
            if not isinstance(value, str) and not all(entry.strip() for entry in names):
                raise ValueError(f"{name}={shown(value)} holds a name without characters, which is no module's.")
            if isinstance(value, str) or name in ("layers_pattern", "modules_to_save"):
                for entry in names:
                    check_regex(name, entry)
        layers = self.layers_to_transform
        if layers is not None and (layers == [] or min([layers] if isinstance(layers, int) else layers) < 0):
            raise ValueError(
                f"layers_to_transform={shown(layers)} has to be one or more indices of layers, which count from 0. "
                "Leave it out for all of them."
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields that a file holds: also one without `peft_version` was saved."""
        if kwargs.get("peft_version") is None:
            kwargs["peft_version"] = "unknown"
        return super().check_kwargs(**kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> SavedConfig:
        """As `PeftConfig.from_peft_type`, for configs of this class alone.

        Raises:
            ValueError: `peft_type` is another method.
        """
        if "peft_type" in kwargs and not (isinstance(kwargs["peft_type"], str) and kwargs["peft_type"] == cls.method):
            raise _other_method(kwargs["peft_type"], cls)
        return super().from_peft_type(**kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As `PeftConfig.save_pretrained`, which every way of saving an adapter calls; writes or renews the card.

        The file appears whole, and last where PEFT saves the adapter: without it, an adapter can't be loaded.

        Raises:
            ValueError: a field was set to a value that could not be loaded again.
        """
        self.check()
        mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{str(save_directory)!r} is a file. Name a folder to save the adapter to.")
        if is_saved_before_weights(save_directory):
            for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):  # of an earlier adapter, which this config is not of
                Path(save_directory, name).unlink(missing_ok=True)
        with replacing(Path(save_directory, ADAPTER_CONFIG_NAME)) as temporary:
            super().save_pretrained(str(temporary.parent), **kwargs)
            os.replace(temporary.with_name(ADAPTER_CONFIG_NAME), temporary)  # behind a link it has another name
            write_card(save_directory, self.card(mapping.get("base_model_class")))

    def card(self, class_name: str | None) -> CardContent:
        """What the card of an adapter with this configuration says.

        Args:
            class_name: transformers' class of the base; `None`: it is not known.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SavedConfig:
        """As `PeftConfig.from_pretrained`.

        Raises:
            ValueError: the file holds another method, or a field has a value that is not allowed; the message names
                folder, field and value.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            where = os.path.join(pretrained_model_name_or_path, subfolder or "", ADAPTER_CONFIG_NAME)
            raise ValueError(f"{where}: {error}") from error
        config.source = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if not os.path.isdir(pretrained_model_name_or_path):
            places: dict[str, Any] = {name: kwargs.get(name) for name in ("revision", "cache_dir")}
            config.download = (pretrained_model_name_or_path, {"subfolder": subfolder or "", **places})
        return config


def _other_method(peft_type: Any, kind: type[SavedConfig]) -> ValueError:
    return ValueError(
        f"peft_type={shown(peft_type)} is another method than that of {kind.__name__}, which is {kind.method!r}. "
        "Leave it out, or take the class of that method."
    )
