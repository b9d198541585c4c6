"""Quality of a real model, or of a plugin for it: one JSON a model; parts that are there are not measured again.

python examples/real_models/measure.py --data DATA --cache CACHE --model all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audio_quality
import causal_quality
import text_quality
import torch
import vision_quality
from peers import quantize, with_plugin
from transformers.utils import logging
from weights import WEIGHTS, Loaded, load

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment, num_threads, share_weights


__all__ = ["PARTS", "measure"]

RESULTS = Path(__file__).parent / "results"
# A part takes the model, the base, what prepares inputs, the data folder and how much of it is used at most.
Part = Callable[[Any, Loaded, Path, int | None], dict[str, Any]]

PARTS: dict[str, dict[str, Part]] = {
    "text": {
        "stsb": lambda model, base, data, limit: text_quality.similarity(model, base.tokenizer, data, limit),
        "sst2": lambda model, base, data, limit: text_quality.probe(model, base.tokenizer, data, limit),
        "mrpc": lambda model, base, data, limit: text_quality.probe_pairs(model, base.tokenizer, data, limit, "mrpc"),
        "qqp": lambda model, base, data, limit: text_quality.probe_pairs(model, base.tokenizer, data, limit, "qqp"),
        "squad": lambda model, base, data, limit: text_quality.retrieval(model, base.tokenizer, data, limit),
    },
    "causal": {
        "wikitext2-256": lambda model, base, data, limit: causal_quality.continuations(
            model, base.model, base.tokenizer, data, limit, 256
        ),
        "wikitext2-1024": lambda model, base, data, limit: causal_quality.continuations(
            model, base.model, base.tokenizer, data, limit, 1024
        ),
        "squad": lambda model, base, data, limit: causal_quality.answers(
            model, base.model, base.tokenizer, data, limit
        ),
    },
    "vision": {
        "cifar10": lambda model, base, data, limit: vision_quality.cifar10_probe(model, data, limit),
        "photographs": lambda model, base, data, limit: vision_quality.photograph_cosine(
            model, base.model, data, limit
        ),
    },
    "audio": {
        "digits": lambda model, base, data, limit: audio_quality.spoken_digits(
            model, base.model, base.tokenizer, base.features, data, limit
        ),
        "sentences": lambda model, base, data, limit: audio_quality.spoken_text(
            model, base.model, base.tokenizer, base.features, data, limit
        ),
    },
}


def measure(
    model: Any,
    base: Loaded,
    kind: str,
    data: Path,
    *,
    limit: int | None = None,
    parts: list[str] | None = None,
    done: dict[str, dict[str, Any]] | None = None,
    facts: dict[str, Any] | None = None,
    on_part: Callable[[dict[str, dict[str, Any]]], object] = lambda results: None,
) -> dict[str, dict[str, Any]]:
    """Figures of each part, with the seconds it took.

    Args:
        model: what is measured; may be the base itself.
        base: the base, its tokenizer and what else prepares inputs.
        kind: a key of `PARTS`.
        data: the data folder.
        limit: rows, prompts, images or utterances of a part at most.
        parts: what is measured; all of the kind's if `None`.
        done: figures from before, which are kept.
        facts: how it is measured, kept beside each part's figures.
        on_part: called with all figures after each part, to keep them.

    Raises:
        ValueError: there is no such part.
    """
    results = dict(done or {})
    for name in parts or PARTS[kind]:
        if name not in PARTS[kind]:
            raise ValueError(f"There is no part {name!r} for {kind}; choose from {', '.join(PARTS[kind])}.")
        if name in results:
            continue
        start = time.perf_counter()
        figures = PARTS[kind][name](model, base, data, limit)
        seconds = round(time.perf_counter() - start, 1)
        results[name] = figures | {"limit": limit, "seconds": seconds} | (facts or {})
        on_part(results)
    return results


def main() -> None:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(WEIGHTS), required=True)
    parser.add_argument("--plugin", type=Path, help="folder of a plugin; without it the base is measured")
    parser.add_argument("--ratio", type=int, help="the plugin's compression ratio; its own if not given")
    parser.add_argument("--fields", type=json.loads, default={}, help="fields of its VariatorConfig, changed, as JSON")
    parser.add_argument("--int8", action="store_true", help="base and plugin in int8")
    parser.add_argument("--part", action="append", help="one part; all if not given")
    parser.add_argument("--limit", type=int, help="rows, prompts, images or utterances of a part at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON to write; results/base-MODEL.json if not given")
    arguments = parser.parse_args()
    if (arguments.plugin or arguments.int8) and not arguments.output:
        parser.error("--plugin and --int8 need --output, so that the base's results are not written over.")
    logging.disable_progress_bar()
    output = arguments.output or RESULTS / f"base-{arguments.model}.json"
    record = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    with num_threads(arguments.threads):
        base = load(arguments.model, arguments.cache)
        model: Any = quantize(base.model) if arguments.int8 else base.model
        if arguments.plugin:
            inner = model if arguments.int8 else share_weights(model)
            model = with_plugin(inner, arguments.plugin, arguments.ratio, fields=arguments.fields)
        weights = WEIGHTS[arguments.model]
        facts = {
            "model": arguments.model,
            "plugin": str(arguments.plugin) if arguments.plugin else None,
            "ratio": arguments.ratio,
            **({"fields": arguments.fields} if arguments.fields else {}),
            "weights_sha256": weights.sha256,
        }
        how = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": describe_environment(torch.device("cpu")),
        }

        def keep(parts: dict[str, dict[str, Any]]) -> None:
            write_text(output, json.dumps(facts | {"parts": parts}, indent=2) + "\n")

        measure(
            model,
            base,
            weights.kind,
            arguments.data,
            limit=arguments.limit,
            parts=arguments.part,
            done=record.get("parts"),
            facts=how,
            on_part=keep,
        )
    print(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
