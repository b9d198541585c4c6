"""Adapters for PEFT that make the models you already have cheaper to run.

Importing this package registers its methods with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` know them.
"""

__version__ = "0.1.0"
