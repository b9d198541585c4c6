"""How much faster than the base each contender runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from contenders import Contender
from evaluation import MAX_TOKENS
from transformers import PreTrainedTokenizerBase

from peft_variator.profiling import Candidate, Measurement, count_flops, peak_memory, time_alternately


__all__ = ["count_steps", "measure_speed"]


@torch.no_grad()
def measure_speed(
    contenders: Sequence[Contender],
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    batch_size: int,
    rounds: int,
    on_step: Callable[[], object],
) -> list[Measurement]:
    """FLOPs, memory and seconds of all, timed in turn, on a batch of `batch_size` × `MAX_TOKENS` real tokens.

    The batch has no padding. Where there is some, a plugin gains more than is shown here, since it never computes it.

    Args:
        contenders: what to time.
        tokenizer: of them all.
        texts: the batch is cut from these, one after the other.
        batch_size: sequences in the batch.
        rounds: timed samples of each.
        on_step: called `count_steps` times.

    Returns:
        The figures of each, in the order of the contenders.

    Raises:
        ValueError: the texts do not fill the batch.
    """
    windows = tokenizer(" ".join(texts), truncation=True, max_length=MAX_TOKENS, return_overflowing_tokens=True)[
        "input_ids"
    ][:-1]
    if len(windows) < batch_size:
        raise ValueError(f"The texts fill {len(windows)} sequences of {MAX_TOKENS} tokens; {batch_size} are needed.")
    input_ids = torch.tensor(windows[:batch_size])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    device = torch.device("cpu")
    candidates, facts = [], {}
    for contender in contenders:
        candidate = Candidate(contender.name, partial(contender.model, **inputs), contender.chosen)
        with contender.chosen():
            facts[contender.name] = count_flops(contender.model, inputs), peak_memory(candidate.run, device)
        candidates.append(candidate)
        on_step()
    samples = time_alternately(candidates, rounds, device=device, on_sample=on_step)
    return [Measurement(name, facts[name][0], None, facts[name][1], seconds) for name, seconds in samples.items()]


def count_steps(contenders: Sequence[Contender], rounds: int) -> int:
    """How often `measure_speed` calls its `on_step`."""
    return len(contenders) * (1 + rounds)
