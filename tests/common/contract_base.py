"""What the parts of the contract share: the cases they run over, and how an adapted model is made and looked at."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ContractCase:
    """One tiny model and how a method is put on it.

    Args:
        name: name of the test.
        build: makes the base model, with the same weights every time.
        inputs: arguments of a call.
        task_type: PEFT's name of the task; `None` for a plain `PeftModel`.
        fields: fields of the method's configuration for this model.
        head: name of a module outside of the adapter's reach that can be trained beside it.
        autocasts: whether the base model runs under autocast at all.
        slow: whether other cases stand for this one by default, in every test.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: dict[str, Tensor]
    task_type: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    autocasts: bool = True
    slow: bool = False

    @property
    def reads_text(self) -> bool:
        return "input_ids" in self.inputs

    @property
    def brings_head(self) -> bool:
        """Whether PEFT trains the model's head beside every adapter, as it does for this task."""
        return self.task_type == "SEQ_CLS"

    @property
    def generates(self) -> bool:
        return self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


FILTERS: dict[str, Callable[[ContractCase], bool]] = {
    "case": lambda case: True,
    "text_case": lambda case: case.reads_text,
    "generating_case": lambda case: case.generates,
    "autocast_case": lambda case: case.autocasts,
    "bare_case": lambda case: not case.brings_head,
    "head_case": lambda case: case.head is not None,
}


def chosen_for(test: str, cases: list[ContractCase]) -> list[ContractCase]:
    """The cases that a test runs on by default: two of them, others for each test; on all of them it is slow."""
    start = zlib.crc32(test.encode())
    return [cases[(start + index) % len(cases)] for index in range(min(2, len(cases)))]


class ContractBase:
    """The method under test, and the cases it is tested on."""

    config_class: ClassVar[type[PeftConfig]]
    random_start: ClassVar[dict[str, Any]]  # fields with which a new adapter changes the base model's outputs
    prefix: ClassVar[str]
    cases: ClassVar[list[ContractCase]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, accepts in FILTERS.items():
            if name in metafunc.fixturenames:
                accepted = [case for case in self.cases if accepts(case)]
                quick = chosen_for(metafunc.function.__name__, [case for case in accepted if not case.slow])
                metafunc.parametrize(
                    name,
                    [
                        pytest.param(case, marks=[pytest.mark.slow] * (case not in quick), id=case.name)
                        for case in accepted
                    ],
                )

    def config(self, case: ContractCase, **fields: Any) -> PeftConfig:
        return self.config_class(task_type=case.task_type, **{**self.random_start, **case.fields, **fields})

    def adapt(self, case: ContractCase, adapter_name: str = "default", **fields: Any) -> PeftModel:
        """A fresh base model with an adapter, in eval mode."""
        torch.manual_seed(0)
        model = get_peft_model(case.build(), self.config(case, **fields), adapter_name=adapter_name)
        self.finish(model, adapter_name)
        return model.eval()

    def add(self, model: PeftModel, case: ContractCase, adapter_name: str, **fields: Any) -> None:
        """One more adapter, with weights of its own."""
        model.add_adapter(adapter_name, self.config(case, **fields))
        self.finish(model, adapter_name)
        model.eval()

    def finish(self, model: PeftModel, adapter_name: str) -> None:
        """What a method asks for after an adapter was made."""

    def adapter_parameters(self, model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
        """Parameters of an adapter, with those of the modules that are saved with it."""
        found = {
            name: parameter
            for name, parameter in model.named_parameters()
            if (f".{self.prefix}" in name or ".modules_to_save." in name) and adapter_name in name.split(".")
        }
        assert found, f"no parameters of {adapter_name!r}"
        return found


def outputs_of(model: nn.Module, case: ContractCase, **changes: Any) -> Tensor:
    """The first output of a call: logits, or the last hidden state."""
    with torch.no_grad():
        output: Tensor = model(**{**case.inputs, **changes})[0]
    return output


def loss_of(model: nn.Module, case: ContractCase) -> Tensor:
    output: Tensor = model(**case.inputs)[0]
    return output.float().square().mean()


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def differ(left: Tensor, right: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    return bool((left - right).abs().max() > 1e-4)


def assert_loaded_alike(loaded: Tensor, saved: Tensor) -> None:
    """Equal but for the last bits, which depend on where a tensor lies: loading may leave it where the file put it."""
    assert_close(loaded, saved, rtol=1e-5, atol=1e-5)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
