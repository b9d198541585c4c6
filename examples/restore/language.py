"""Real language models: pruned 2:4, restored on text, measured on other text.

stories260K, a tiny Llama, has one half of a TinyStories sample to restore and the other to measure on; SmolLM2 has
WikiText-2 validation with SQuAD's passages, and WikiText-2 test and, out of domain, TinyStories.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from training import RANK, VARIANTS, adapt, refill_zeros, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator, set_seed

from peft_variator.bases import merge_checkpoint, pack_checkpoint
from peft_variator.files import new_folder
from peft_variator.sparsity import PruningConfig, measure_sparsity, prune


__all__ = ["METHODS", "LanguageModel", "SmolLM2"]

METHODS = ("wanda", "sparsegpt")
PROMPT = "The history of the city"


class LanguageModel:
    """stories260K, its text, and what is done with it.

    Args:
        data: folder that holds a folder a data set.
        steps: optimizer steps of a restoration.
        evaluated: windows of tokens to measure on, of each text.
        work: folder for checkpoints, with which a run that was stopped goes on; `None`: it starts anew.
    """

    length, calibration, batch_size, learning_rate, rank = 256, 64, 8, 2e-3, RANK
    evaluated_together = 16

    def __init__(self, data: Path, steps: int, evaluated: int, work: Path | None = None) -> None:
        self.data, self.steps, self.evaluated, self.work = data, steps, evaluated, work

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The model as it was published."""
        return AutoModelForCausalLM.from_pretrained(self.data / "stories260k" / "hf").eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.data / "stories260k" / "hf")

    @property
    def stories(self) -> list[str]:
        """Those of the TinyStories sample."""
        text = (self.data / "tinystories_sample" / "tinystories_sample.txt").read_text(encoding="utf-8")
        return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]

    @cached_property
    def training(self) -> torch.Tensor:
        """What is pruned and restored with: (windows, length)."""
        return self.windows(self.stories[: len(self.stories) // 2])

    @cached_property
    def held_out(self) -> dict[str, torch.Tensor]:
        """What is measured on, by the name of the figure: (windows, length)."""
        return {"loss": self.windows(self.stories[len(self.stories) // 2 :])[: self.evaluated]}

    def windows(self, texts: list[str]) -> torch.Tensor:
        """The texts one after the other, each with its start token if it gets one, cut into windows."""
        tokens = [token for ids in self.tokenizer(texts)["input_ids"] for token in ids]
        return torch.tensor(tokens[: len(tokens) // self.length * self.length]).view(-1, self.length)

    @torch.no_grad()
    def losses(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean negative log-likelihood of a token of each held-out text, in nats."""
        model.eval()
        found = {}
        for name, rows in self.held_out.items():
            batches = rows.split(self.evaluated_together)
            found[name] = sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in batches) / len(rows)
        return found

    def prune(self, method: str, seed: int) -> PreTrainedModel:
        """The model, pruned 2:4; read from `work` if it is there."""
        folder = None if self.work is None else self.work / f"pruned-{method}-seed{seed}"
        if folder is not None and (folder / "config.json").is_file():
            return AutoModelForCausalLM.from_pretrained(folder).eval()
        pruned = copy.deepcopy(self.dense)
        chosen = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))[: self.calibration]
        batches = [{"input_ids": batch} for batch in self.training[chosen].split(16)]
        config = PruningConfig(method=method, pattern="2:4")
        prune(pruned, config, None if method == "magnitude" else batches, progress=False)
        if folder is not None:
            with new_folder(folder) as temporary:
                pruned.save_pretrained(temporary)
        return pruned

    def run(self, method: str, variant: str, seed: int) -> dict[str, Any]:
        """Prune, restore (variants but "pruned" and "dense"), merge, measure."""
        if variant == "dense":
            return self._measured(self.dense)
        pruned = self.prune(method, seed)
        if variant == "pruned":
            return self._measured(pruned)
        set_seed(seed)
        how = VARIANTS[variant]
        run = None if self.work is None else self.work / f"{method}-{variant}-seed{seed}"
        if run is not None and (run / "adapter").is_dir():
            model = PeftModel.from_pretrained(copy.deepcopy(pruned), run / "adapter")
            parameters = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
        else:
            model = self._train(pruned, variant, seed, run)
            parameters = model.get_nb_trainable_parameters()[0]
            if run is not None:
                with new_folder(run / "adapter") as temporary:
                    model.save_pretrained(temporary)
        merged = model.merge_and_unload(safe_merge=True)
        found = {"trained_parameters": parameters, "steps": self.steps, **self._measured(merged)}
        if how.masked and self.work is not None and run is not None:
            found["packed"] = self._deliver(merged, self.work / f"pruned-{method}-seed{seed}", run / "adapter")
        if not how.masked:
            refill_zeros(merged, pruned)
            found |= {f"{name}_with_zeros_put_back": value for name, value in self.losses(merged).items()}
        return found

    def _train(self, pruned: PreTrainedModel, variant: str, seed: int, checkpoints: Path | None) -> PeftModel:
        how = VARIANTS[variant]
        model = adapt(copy.deepcopy(pruned), how.masked, self.rank)
        train(
            model,
            how.weights,
            copy.deepcopy(self.dense) if how.distilled else None,
            [{"input_ids": row, "labels": row} for row in self.training],
            default_data_collator,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            checkpoints=checkpoints,
        )
        return model

    @torch.no_grad()
    def _deliver(self, merged: PreTrainedModel, pruned: Path, adapter: Path) -> dict[str, Any]:
        """Pack the pruned model, merge the adapter by file, load what came out, and generate from it.

        Raises:
            ValueError: it does not compute what the model merged in memory does.
        """
        with tempfile.TemporaryDirectory() as scratch:
            packed, output = Path(scratch) / "packed", Path(scratch) / "merged"
            pack_checkpoint(pruned, packed)
            merge_checkpoint(packed, adapter, output)
            loaded = AutoModelForCausalLM.from_pretrained(output).eval()
            sizes = {"pruned": _bytes(pruned), "merged": _bytes(output)}
        rows = next(iter(self.held_out.values()))[:2]
        expected = merged.eval()(input_ids=rows).logits
        difference = (loaded(input_ids=rows).logits - expected).abs().max().item()
        if not difference <= 1e-3 * expected.abs().max().item():
            raise ValueError(f"The packed model's logits differ from the merged one's by {difference:.1e}.")
        prompt = self.tokenizer(PROMPT, return_tensors="pt")
        written = loaded.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
        return {
            "bytes": sizes,
            "largest_difference_of_logits": difference,
            "generated": self.tokenizer.decode(written, skip_special_tokens=True),
        }

    def _measured(self, model: PreTrainedModel) -> dict[str, Any]:
        blocks = [row for row in measure_sparsity(model, "2:4").modules if ".layers." in f".{row.name}"]
        return {
            **self.losses(model),
            "sparsity": sum(row.zeros for row in blocks) / sum(row.weights for row in blocks),
            "pattern_met": all(row.pattern_met for row in blocks),
            "tokens": sum(rows.numel() for rows in self.held_out.values()),
        }


class SmolLM2(LanguageModel):
    """SmolLM2-135M-Instruct, dequantised from Q4_1.

    Args:
        data: folder that holds `wikitext2_valid_test`, `squad_v1_dev` and `tinystories_sample`.
        steps: optimizer steps of a restoration.
        evaluated: windows of 128 tokens to measure on, of each text.
        work: folder for checkpoints and pruned models.
        cache: folder that `examples/real_models/weights.py` filled.
    """

    length, learning_rate, rank, evaluated_together = 128, 1e-3, 32, 8

    def __init__(self, data: Path, steps: int, evaluated: int, work: Path | None, cache: Path) -> None:
        super().__init__(data, steps, evaluated, work)
        real_models = str(Path(__file__).resolve().parents[1] / "real_models")
        if real_models not in sys.path:
            sys.path.append(real_models)
        from weights import load

        loaded = load("SmolLM2-135M-Instruct", cache)
        self.dense, self.tokenizer = loaded.model, loaded.tokenizer

    @cached_property
    def training(self) -> torch.Tensor:
        """WikiText-2 validation and passages of the SQuAD articles that nothing is measured on."""
        from texts import training_text

        texts = training_text(self.data, ["wikitext2", "squad"])
        return self.windows([text for text in texts if not text.endswith("?")])

    @cached_property
    def held_out(self) -> dict[str, torch.Tensor]:
        """WikiText-2 test and, out of domain, TinyStories; windows are spread over the texts."""
        from texts import wikitext2

        sets = {"loss": self.windows(wikitext2(self.data, "test")), "loss_tinystories": self.windows(self.stories)}
        return {name: rows[:: max(1, len(rows) // self.evaluated)][: self.evaluated] for name, rows in sets.items()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
