"""Plugins in the trained LLaVA, by what they merge, and one in the LLaVA that was pruned and restored.

python examples/vlm_restore/train_base.py --data DATA/easy_vqa
python examples/vlm_restore/plugins.py --data DATA/easy_vqa
python examples/vlm_restore/plugins.py --data DATA/easy_vqa --speed   # on a machine that does nothing else
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import IMAGE_TOKENS, Example, single_questions, stack_pixels
from peft import PeftModel, get_peft_model
from plan import Run
from rich.console import Console
from runs import Study, train
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, set_seed

from peft_variator import VariatorConfig, using_ratio
from peft_variator.files import write_text
from peft_variator.profiling import Candidate, count_flops, describe_environment, speedup, time_alternately
from peft_variator.sparsity import measure_sparsity


WORK = Path("outputs/vlm_restore")
RESULTS = Path(__file__).parent / "results"
RATIOS = (2, 4, 8)
BATCH_SIZE, LEARNING_RATE, TIMED_BATCHES = 32, 2e-3, (1, 64)
KINDS = ("compress_image_tokens", "compress_text_tokens", "compress_vision_tower")
MERGED = {
    "image tokens": KINDS[:1],
    "text tokens": KINDS[1:2],
    "the vision tower's patches": KINDS[2:],
    "all three": KINDS,
}
"""What a plugin merges."""
RESTORED = "all three, pruned and restored"
"""The plugin in the LLaVA that Wanda pruned 2:4 in both towers and SparseLoRA restored."""
console = Console(soft_wrap=True)


class Questions:
    """Makes batches of single questions, as a user sends them.

    Args:
        tokenizer: tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def prompts(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, `(batch, length)`, and `pixel_values`, of questions of one length."""
        return self._batch(examples, [example.questions[0][0] for example in examples])

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The same with the answers, which have the only labels; padded on the right."""
        batch = self._batch(examples, [" ".join(example.questions[0]) for example in examples])
        last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
        labels = torch.full_like(batch["input_ids"], -100)
        return batch | {"labels": labels.scatter_(1, last, batch["input_ids"].gather(1, last))}

    def _batch(self, examples: Sequence[Example], texts: list[str]) -> dict[str, Tensor]:
        texts = ["<image>" * IMAGE_TOKENS + " " + text for text in texts]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {name: tokens[name] for name in names} | {"pixel_values": stack_pixels(examples)}


class Plugins:
    """What is trained and measured.

    Args:
        study: the base and its data.
        steps: optimizer steps of a plugin, of 32 questions.
        questions: test questions.
    """

    def __init__(self, study: Study, steps: int, questions: int) -> None:
        self.study, self.steps = study, steps
        self.collate = Questions(study.tokenizer)
        self.train = single_questions(study.train)
        chosen = torch.randperm(sum(len(example.questions) for example in study.test))[:questions].tolist()
        singles = single_questions(study.test)
        self.test = sorted((singles[index] for index in chosen), key=self._length)

    def _length(self, example: Example) -> int:
        return len(self.study.tokenizer(example.questions[0][0])["input_ids"])

    def _batches(self, size: int) -> Iterator[list[Example]]:
        """The test questions in batches of one length, so that nothing is padded."""
        for _, same in groupby(self.test, key=self._length):
            examples = list(same)
            yield from (examples[start : start + size] for start in range(0, len(examples), size))

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module) -> float:
        """Share of the questions whose most likely next token is the answer; in float32."""
        right = 0
        for examples in self._batches(64):
            guesses = model(**self.collate.prompts(examples)).logits[:, -1].argmax(-1).tolist()
            answers = [example.questions[0][1] for example in examples]
            right += sum(map(str.__eq__, self.study.tokenizer.convert_ids_to_tokens(guesses), answers))
        return right / len(self.test)

    def base(self, name: str, folder: Path) -> LlavaForConditionalGeneration:
        """What a plugin goes into: the base, or the pruned and restored one, which is made once and kept."""
        if name != RESTORED:
            return copy.deepcopy(self.study.dense)
        if not (folder / "config.json").is_file():
            run = Run("wanda", (("vision", "2:4"), ("language", "2:4")), "sparse-lora")
            pruned, report = self.study.prune(run)
            merged, _ = self.study.restore(pruned, [row.name for row in report.modules], run)
            merged.save_pretrained(folder)
        return LlavaForConditionalGeneration.from_pretrained(folder).eval()

    def fit(self, base: LlavaForConditionalGeneration, kinds: Sequence[str]) -> PeftModel:
        """A plugin for `base` that follows it without labels' help: hidden states, and logits of the answer."""
        set_seed(0)
        config = VariatorConfig(compression_ratio=4, **{kind: kind in kinds for kind in KINDS})
        model = get_peft_model(base, config)
        train(
            model,
            self.train,
            self.collate,
            ratios=list(RATIOS),
            max_steps=self.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            logits_weight=1.0,
        )
        return model.eval()

    def quality(self, model: PeftModel) -> list[dict[str, Any]]:
        """A row a ratio, 1 among them: accuracy, and the FLOPs of one question."""
        rows = []
        for ratio in (1, *RATIOS):
            with using_ratio(model, ratio):
                flops = count_flops(model, self.collate.prompts(self.test[:1]))
                rows.append({"ratio": ratio, "accuracy": self.accuracy(model), "flops": flops})
        return rows

    def speed(self, model: PeftModel, size: int, rounds: int) -> dict[str, dict[str, float]]:
        """Times as fast as k = 1 by ratio, of a batch of `size` questions."""
        inputs = self.collate.prompts(next(batch for batch in self._batches(size) if len(batch) == size))

        def forward() -> None:
            with torch.inference_mode():
                model(**inputs)

        ratios = (1, *RATIOS)
        candidates = [Candidate(str(ratio), forward, partial(using_ratio, model, ratio)) for ratio in ratios]
        seconds = time_alternately(candidates, rounds, device=torch.device("cpu"))
        return {str(ratio): asdict(speedup(seconds["1"], seconds[str(ratio)])) for ratio in RATIOS}


def main(
    data: Annotated[Path, typer.Option(help="Folder of easy-VQA.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a plugin.")] = 300,
    restoration_steps: Annotated[int, typer.Option(help="Optimizer steps of SparseLoRA, on what is pruned.")] = 200,
    questions: Annotated[int, typer.Option(help="Test questions.")] = 3000,
    speed: Annotated[bool, typer.Option("--speed", help="Time what was trained, and do no more.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed samples of each.")] = 9,
    work: Annotated[Path, typer.Option(help="Where train_base.py put the model.")] = WORK,
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
) -> None:
    """Train and measure what is not there yet, or time what is: one JSON a plugin."""
    if not (work / "base" / "config.json").is_file():
        raise typer.BadParameter(f"There is no trained model in {work / 'base'}. Run train_base.py first.")
    set_seed(0)
    plugins = Plugins(Study(data, work / "base", restoration_steps), steps, questions)
    how = {"command": shlex.join(["python", *sys.argv]), "environment": describe_environment(torch.device("cpu"))}
    for name in (*MERGED, RESTORED):
        short = re.sub(r"\W+", "-", name)
        file, folder = results / f"plugin-{short}.json", work / "plugins" / short
        if file.is_file() != speed:
            continue
        base = plugins.base(name, work / "restored")
        if speed:
            model = PeftModel.from_pretrained(base, str(folder)).eval()
            timed = {str(size): plugins.speed(model, size, rounds) for size in TIMED_BATCHES}
            record = json.loads(file.read_text("utf-8")) | {"speed": how | {"batches": timed}}
        else:
            parameters = base.num_parameters()  # without the plugin's, which are put into it
            model = plugins.fit(base, MERGED.get(name, KINDS))
            model.save_pretrained(str(folder))
            record = {
                "merges": name,
                "steps": steps,
                "questions": len(plugins.test),
                "parameters": {"base": parameters, "plugin": model.get_nb_trainable_parameters()[0]},
                "zeros": measure_sparsity(plugins.base(name, work / "restored")).sparsity,
                "rows": plugins.quality(model),
                **how,
            }
        write_text(file, json.dumps(record, indent=2) + "\n")
        console.print(f"{name}: {file}")
    console.print("Next: python examples/vlm_restore/render.py")


if __name__ == "__main__":
    typer.run(main)
