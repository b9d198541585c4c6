"""The model card of an adapter: README.md with metadata for the Hub, and a section of ours that is renewed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from transformers.models.auto import modeling_auto
from yaml import YAMLError

from .files import write_text
from .markdown import replace_between
from .version import __version__


__all__ = [
    "AUTO_CLASSES",
    "MARKER",
    "CardContent",
    "hub_id",
    "loading_code",
    "make_card",
    "measured",
    "pipeline_tag",
    "set_license",
    "usage",
    "usage_of_config",
    "write_card",
]

README = "README.md"
MARKER = "peft-variator"
"""Name of the markers around our section of a card."""
HELD_OUT = "held-out"  # the data set of results in a card's metadata that are ours
_BASE_TAG = "base_model:adapter:"

_TASK_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# The first that has a class decides.
_CLASS_TAGS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "text-generation",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "automatic-speech-recognition",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "text-generation",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "image-text-to-text",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "text-classification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "token-classification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "question-answering",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "fill-mask",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-classification",
    "MODEL_FOR_IMAGE_MAPPING_NAMES": "image-feature-extraction",
    "MODEL_MAPPING_NAMES": "feature-extraction",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES": "feature-extraction",
}


@dataclass(frozen=True)
class CardContent:
    """What a card says of an adapter.

    Args:
        body: our section, in Markdown.
        base: the base model as the adapter names it; only a name on the Hub gets into the metadata.
        tags: tags for the Hub.
        pipeline_tag: the Hub's name of what the model does, or `None`.
        license: identifier of the license, or `None`: the card keeps the one that it has.
        name: what the results are those of.
        results: what was measured.
    """

    body: str
    base: str | None
    tags: Sequence[str]
    pipeline_tag: str | None = None
    license: str | None = None
    name: str = "adapter"
    results: Sequence[EvalResult] = ()


def hub_id(name: str | None) -> str | None:
    """`name` if it is that of a repository on the Hub, `None` if it is a path or nothing."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def pipeline_tag(class_name: str | None, task_type: str | None = None) -> str | None:
    """The Hub's name of what a model does, by its class in transformers or PEFT's task; `None`: it is not known."""
    if task_type is not None:
        return _TASK_TAGS.get(task_type)
    for mapping, tag in _CLASS_TAGS.items():
        for names in getattr(modeling_auto, mapping).values():
            if class_name == names or (not isinstance(names, str) and class_name in names):
                return tag
    return None


def measured(
    measure: str, value: float, ratio: int | None = None, task: str | None = None, name: str | None = None
) -> EvalResult:
    """A result for the metadata of a card, measured on held-out data.

    Args:
        measure: name of the measure, such as `"cosine"`.
        value: what was measured.
        ratio: compression ratio k that it was measured at.
        task: the Hub's name of what the model does.
        name: the measure in words; `None`: those of its name.
    """
    at = "" if ratio is None else f" at k = {ratio}"
    return EvalResult(
        task_type=task or "other",
        dataset_type=HELD_OUT,
        dataset_name="held-out examples of the training data",
        metric_type=measure,
        metric_name=f"{name or measure.replace('_', ' ')}{at}",
        metric_value=round(float(value), 6),
    )


def make_card(content: CardContent, readme: str | None = None) -> ModelCard:
    """A card with our section and metadata.

    Args:
        content: what it is to say.
        readme: the card that exists, whose text stays; one that holds nothing but the Hub's template is replaced.

    Raises:
        ValueError: its metadata is no YAML, or it does not have the markers of our section once each, in their order.
    """
    card = _parsed(readme or "")
    text = "" if _is_template(card.text) else card.text
    if f"<!-- {MARKER} -->" in text or f"<!-- /{MARKER} -->" in text:
        text = replace_between(text, MARKER, content.body.strip())
    else:
        section = f"<!-- {MARKER} -->\n\n{content.body.strip()}\n\n<!-- /{MARKER} -->\n"
        text = f"{text.rstrip()}\n\n{section}" if text.strip() else f"\n{section}"
    data = _metadata(card.data, content)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n")  # PEFT takes an end of line away


def write_card(folder: str | Path, content: CardContent) -> None:
    """Write or renew README.md in a folder. One that can't be renewed is left as it is, with a warning."""
    readme = Path(folder, README)
    try:
        text = readme.read_text(encoding="utf-8") if readme.is_file() else None
        card = make_card(content, text)
    except ValueError as error:  # UnicodeDecodeError too
        warnings.warn(
            f"{readme} was left as it is, without what this adapter is: {error} Mend it, or remove it and save again.",
            UserWarning,
            stacklevel=2,
        )
        return
    write_text(readme, str(card))


def set_license(folder: str | Path, license: str) -> None:
    """Set the license in the metadata of the README.md of a folder, which is made where it is missing."""
    readme = Path(folder, README)
    card = _parsed(readme.read_text(encoding="utf-8") if readme.is_file() else "")
    card.data["license"] = license
    write_text(readme, str(card))


def _parsed(text: str) -> ModelCard:
    """A card of a page with or without metadata; raises ValueError for metadata that is none."""
    try:
        return ModelCard(text if text.startswith("---\n") else f"---\n{{}}\n---\n{text}")
    except (YAMLError, TypeError) as error:
        raise ValueError(f"Its metadata can't be read: {error}") from error


def _metadata(data: Any, content: CardContent) -> ModelCardData:
    fields: dict[str, Any] = data.to_dict()
    theirs = [result for result in data.eval_results or () if result.dataset_type != HELD_OUT]
    fields.pop("model-index", None)
    name = hub_id(content.base)
    earlier = fields.pop("base_model", None)
    kept = [each for each in (earlier if isinstance(earlier, list) else [earlier]) if hub_id(each)]
    base = name or (kept[0] if len(kept) == 1 else kept or None)
    fields["library_name"] = "peft"
    earlier_tags = fields.get("tags") or ()
    earlier_tags = [earlier_tags] if isinstance(earlier_tags, str) else earlier_tags
    fields["tags"] = _merged_tags(map(str, earlier_tags), content.tags, base)
    if content.pipeline_tag is not None:
        fields.setdefault("pipeline_tag", content.pipeline_tag)
    if content.license is not None:
        fields["license"] = content.license
    results = [*theirs, *content.results]
    if results:
        fields.update(eval_results=results, model_name=data.model_name if theirs else content.name)
    if base is not None:
        fields["base_model"] = base
    return ModelCardData(**fields)


def _merged_tags(earlier: Iterable[str], ours: Iterable[str], base: str | list[str] | None) -> list[str]:
    """The tags that are there and ours, but PEFT's tag of a base that is a path."""
    fitting = [tag for tag in earlier if not tag.startswith(_BASE_TAG) or hub_id(tag.removeprefix(_BASE_TAG))]
    named = [f"{_BASE_TAG}{base}"] if isinstance(base, str) else []
    return list(dict.fromkeys([*fitting, *ours, *named]))


def _is_template(text: str) -> bool:
    """Whether a card's text is what PEFT or transformers write where there is none, and nothing else."""
    return _bare(text) in _templates() or not text.strip()


@cache
def _templates() -> frozenset[str]:
    data = ModelCardData()
    return frozenset({_bare(ModelCard.from_template(data).text)})


def _bare(text: str) -> str:
    """A text without what is filled in: versions, descriptions, empty lines."""
    lines = (line.strip() for line in text.splitlines())
    kept = [
        line
        for line in lines
        if line
        and not re.match(r"- PEFT \d|### Framework versions", line)
        and not line.startswith("This is the model card of a 🤗 transformers model")
    ]
    return "\n".join(kept)


def loading_code(base: str, loader: str, name: str, lines: Iterable[str] = ()) -> list[str]:
    """Lines of Python that load an adapter onto its base.

    Args:
        base: the base model, as `from_pretrained` takes it.
        loader: transformers' class that it is loaded with.
        name: the adapter, as `from_pretrained` takes it.
        lines: what comes after loading.
    """
    return [
        "import peft_variator",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(model, {name!r})",
        *lines,
    ]


def usage(code: Iterable[str]) -> str:
    """How to install what an adapter needs, and the code that loads it, in Markdown."""
    return (
        "## Use\n\n```\npip install peft-variator\n```\n\n"
        "`import peft_variator` comes first: it makes the method known to PEFT, which fails without.\n\n"
        "```python\n" + "\n".join(code) + "\n```\n"
    )


def usage_of_config(config: PeftConfig, class_name: str | None, lines: Iterable[str]) -> str:
    """How to load the adapter of a configuration, and the versions that it was saved with, in Markdown.

    Args:
        config: the configuration.
        class_name: transformers' class of the base; `None`: it is not known.
        lines: Python code that comes after loading.
    """
    loader = class_name or AUTO_CLASSES.get(config.task_type or "", "AutoModel")
    code = loading_code(hub_id(config.base_model_name_or_path) or "BASE", loader, "ADAPTER", lines)
    code = [f"{line}  # this folder, or its name on the Hub" if "'ADAPTER'" in line else line for line in code]
    return (
        f"{usage(code)}\n### Framework versions\n\n- PEFT {version('peft')}\n- peft-variator {__version__}\n"
        f"- transformers {version('transformers')}\n"
    )
