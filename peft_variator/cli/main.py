"""The `peft-variator` command line: every command with its options, and nothing that takes time to import.

What a command does stands in the file of its name. It is imported when the command runs, after its options were read:
help and mistyped options need neither torch nor PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ..files import check_data_name, check_new_folder
from ..sparsity.methods import METHODS, make_method, method_options
from ..version import __version__
from .console import Reporter, default_device, errors_told, parse_ratios, parse_shares, parse_spans, reported


__all__ = ["app"]

# Spellings of earlier versions, still understood.
RENAMED = {"--ratios": "--ratio", "--batch": "--batch-size", "--device-map": "--device"}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}

Task = Literal["encoder", "causal", "seq2seq", "vision"]
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


class Command(TyperCommand):
    """A command that understands the earlier spellings of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, with the options under their present names."""
        return super().parse_args(ctx, [_renamed(word) for word in args])


def _renamed(word: str) -> str:
    name, equals, value = word.partition("=")
    return RENAMED.get(name, name) + equals + value


class Group(TyperGroup):
    """The commands, sorted by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands."""
        return sorted(super().list_commands(ctx))


app = typer.Typer(
    help="Make the models you already have cheaper to run.",
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the result.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K,K", help="Compression ratio k (4), repeated or with commas: one plugin serves all of them."
    ),
]


def _ratios(left_out: str) -> Any:
    """The option for some ratios, with what is meant if none is given."""
    return typer.Option(metavar="K,K", help=f"Compression ratios k, repeated or with commas; left out: {left_out}.")


Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="E.g. cpu or cuda:1; left out: a GPU if there is one.")]
Json = Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the figures as JSON; -: to standard output.")]
Method = Annotated[MethodName, typer.Option(help="How weights are chosen.")]
Png = Annotated[Path | None, typer.Option(help="Write a picture to this file; needs the extra 'plots'.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
TaskOption = Annotated[Task | None, typer.Option(help="How the model is used; left out: read off the architecture.")]
Data = Annotated[
    list[str],
    typer.Option(
        metavar="FILE|DIR|HUB",
        help="Text file, table (.csv, .tsv, .parquet, .json, .jsonl), data set on the Hub; for vision models a folder "
        "of images. Repeatable.",
    ),
]
Rate = Annotated[float, typer.Option(help="Peak learning rate; it warms up and follows a cosine to 0.")]
TextColumn = Annotated[str, typer.Option(help="Column of a table or data set that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
Plugin = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub name of a Variator plugin.")]
Base = Annotated[str | None, typer.Option(help="Base model; left out: the one that the plugin names.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of weights and activations.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; left out: as torch chooses.")]
License = Annotated[str | None, typer.Option(help="License to name in the card, e.g. apache-2.0.")]
PushToHub = Annotated[str | None, typer.Option(metavar="REPO", help="Repository on the Hub to push the result to.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-variator {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make the models you already have cheaper to run."""


def _command(
    name: str, short_help: str, *, makes_folder: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, in which bad input ends in a message; see [`reported`].

    Args:
        name: the command's name.
        short_help: a line about it.
        makes_folder: it makes a folder `output`, of `data` if it has any: paths are looked at before all else, as what
            the command needs takes seconds to import.
    """

    def register(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def checked(**values: Any) -> None:
            if makes_folder:
                with errors_told():
                    check_new_folder(values["output"])
                    for data in values.get("data") or ():
                        check_data_name(data)
            reported()(command)(**values)

        made = app.command(name, cls=Command, context_settings=CONTEXT, short_help=short_help)
        return made(checked)

    return register


def _with_options(
    parameters: Iterable[inspect.Parameter], after: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command more options behind the one named `after`; it gets them as keywords."""
    added = list(parameters)

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        found = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
        place = 1 + [item.name for item in found].index(after)
        found[place:place] = added
        extended: Any = command
        extended.__signature__ = signature.replace(parameters=found)
        extended.__annotations__ = {item.name: item.annotation for item in found}
        return command

    return extend


def _method_options() -> Iterator[inspect.Parameter]:
    """The options of every pruning method; None where not given."""
    for name, option in method_options().items():
        info = typer.Option(min=option.at_least, help=f"{option.help.removesuffix('.')} ({option.default}).")
        kind: Any = Annotated[option.kind | None, info]
        yield inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=kind)


def _run_options() -> Iterable[inspect.Parameter]:
    """The options of every command that trains."""

    def options(
        steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
        batch_size: Annotated[int, typer.Option(help="Examples in a batch, on each process.")] = 16,
        accumulation: Annotated[int, typer.Option(help="Batches in an optimizer step.")] = 1,
        max_length: Annotated[
            int, typer.Option(help="Most tokens in an example; spans vary from a quarter up.")
        ] = 128,
        held_out: Annotated[int, typer.Option(help="Examples to measure on; at most a tenth of the data.")] = 128,
        text_column: TextColumn = "text",
        split: Split = "train",
        task: TaskOption = None,
        bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
        checkpoints: Annotated[
            Path | None, typer.Option(help="Save ten checkpoints here, and go on from the last one that is found.")
        ] = None,
        device: Device = None,
        seed: Seed = 0,
        license: License = None,
        push_to_hub: PushToHub = None,
    ) -> None: ...

    return inspect.signature(options, eval_str=True).parameters.values()


@_command("bench", "Measure how much faster a plugin is.")
def bench_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub name, folder, path of a config.json, or name of a known shape. With --adapter: the base, if it "
            "is not the one that the adapter names.",
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or Hub name of a saved plugin to measure instead of a fresh one.")
    ] = None,
    ratio: Annotated[list[str] | None, _ratios("2,4,8, or those of the saved plugin")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences or images in a batch.")] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens of the longest sequence (128). Not for images.")] = None,
    lengths: Annotated[
        Literal["even", "uneven"],
        typer.Option(help="uneven: lengths are drawn from a quarter of --length up, and padded."),
    ] = "even",
    dtype: Dtype = "float32",
    rounds: Annotated[int, typer.Option(help="Timed samples of each setting.")] = 10,
    min_seconds: Annotated[float, typer.Option(help="Short calls are repeated to fill a sample of so many.")] = 0.2,
    threads: Threads = None,
    task: TaskOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Read only the configuration of MODEL and draw the weights.")
    ] = False,
    with_disabled: Annotated[
        bool, typer.Option("--with-disabled", help="Measure the plugin switched off, too.")
    ] = False,
    device: Device = None,
    seed: Seed = 0,
    json: Json = None,
    png: Png = None,
    quiet: Quiet = False,
) -> None:
    """Measure how much faster a Variator plugin makes MODEL, and how much of the ideal that is.

    The untouched model and the model with a plugin run in turn in one process. Causal models are measured on a
    prefill, encoder-decoders on the encoder and one decoder step.
    """
    reporter = Reporter(json, png, quiet)
    ratios = parse_ratios(ratio)
    from ..profiling import BenchmarkSettings
    from .bench import bench, find_subject

    model, default_ratios = find_subject(model, adapter)
    bench(
        BenchmarkSettings(
            model=model,
            ratios=default_ratios if ratios is None else ratios,
            adapter=adapter,
            batch=batch_size,
            length=length,
            lengths=lengths,
            dtype=dtype,
            device=default_device(device),
            rounds=rounds,
            min_seconds=min_seconds,
            threads=threads,
            task=task,
            random_weights=random_weights,
            with_disabled=with_disabled,
            seed=seed,
        ),
        reporter,
    )


@_command("convert-checkpoint", "Convert a plugin of the paper's authors.")
def convert_checkpoint_command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Plugin file as released for T5, saved by torch.")
    ],
    output: Output,
    base: Annotated[str | None, typer.Option(help="Hub name or folder of its T5, for the adapter to name.")] = None,
    residual_scale: Annotated[
        float | None,
        typer.Option(
            help="What the T5 trained on was divided by; left out: 100 at the sizes of t5-small, base and large."
        ),
    ] = None,
    license: License = None,
    push_to_hub: PushToHub = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Convert CHECKPOINT, a plugin that the paper's authors released for T5, to an adapter for PEFT.

    Only weights are read from the file, nothing in it is run. Where k divides the length of a text the adapter
    computes what the released code does; unlike it, padding is never merged with text.
    """
    from .conversions import convert_released
    from .publishing import Publishing

    publishing = Publishing(push_to_hub, license)
    convert_released(checkpoint, output, base, residual_scale, publishing, Reporter(json, None, quiet))


@_command("doctor", "Say what runs on this machine, and why not.")
def doctor_command(json: Json = None, quiet: Quiet = False) -> None:
    """Say which versions and devices are here, which kernels run and why others don't.

    Versions are compared with the range that the package is tested with. The first run may compile a kernel.
    """
    from .doctor import doctor

    doctor(Reporter(json, None, quiet))


@_command("evaluate", "Say whether a plugin pays on your data.")
def evaluate_command(
    adapter: Plugin,
    data: Data,
    base: Base = None,
    ratio: Annotated[list[str] | None, _ratios("those it was trained for")] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Ask for the largest k whose mean cosine to the base is at least this.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Ask for the largest k with at least this share of the base's predictions."),
    ] = None,
    max_nll: Annotated[
        float | None,
        typer.Option(help="Ask for the largest k with at most this negative log-likelihood of a token."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Most texts or images that are used, drawn by --seed.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed samples of each setting.")] = 5,
    min_seconds: Annotated[float, typer.Option(help="Short samples are repeated to fill so many seconds.")] = 0.2,
    text_column: TextColumn = "text",
    split: Split = "train",
    dtype: Dtype = "float32",
    threads: Threads = None,
    device: Device = None,
    seed: Seed = 0,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure ADAPTER on your texts at their lengths: quality and speed for each k, and whether it pays.

    Each line of a plain text file is one text (`train` takes the whole file for one document); of a table each row is.
    Encoders are judged by the cosine of hidden states to the base's, classifiers also by agreement of predictions;
    language models read the first part of a text, and by agreement and negative log-likelihood of the rest. Base and
    plugin are timed in turn in one process; causal models on a prefill.
    """
    ratios = parse_ratios(ratio)
    from .evaluate import EvaluateJob, evaluate

    job = EvaluateJob(
        adapter=adapter,
        data=data,
        base=base,
        ratio=ratios,
        min_cosine=min_cosine,
        min_agreement=min_agreement,
        max_nll=max_nll,
        examples=examples,
        batch_size=batch_size,
        rounds=rounds,
        min_seconds=min_seconds,
        text_column=text_column,
        split=split,
        dtype=dtype,
        threads=threads,
        device=default_device(device),
        seed=seed,
    )
    evaluate(job, Reporter(json, None, quiet))


@_command("export", "Write a model with its plugin as ONNX.")
def export_command(
    adapter: Plugin,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, ending in .onnx.")],
    ratio: Annotated[int | None, typer.Option(help="Compression ratio k; left out: the plugin's own.")] = None,
    base: Base = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write the base of ADAPTER with the plugin as one ONNX file, at one ratio, with the tokenizer beside it.

    Batch and length stay free. ONNX Runtime has to agree with PyTorch before the file gets its name. Text and vision
    encoders only; needs the extra 'onnx'.
    """
    from .export import export

    export(adapter, output, ratio, base, Reporter(json, None, quiet))


@_command("info", "Say what an adapter or a packed model is.")
def info_command(
    source: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="Folder, or repository on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder in it.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Say what is in REPO_OR_DIR: method, base, ratios, size, share of the base, and FLOPs where they are known.

    Adapters of either method, folders of them, and packed bases. Weights are neither loaded nor, from the Hub,
    downloaded. Offline, the Hub's cache is looked at. A private repository needs `hf auth login` or HF_TOKEN.
    """
    from .info import info

    info(source, revision, subfolder, Reporter(json, None, quiet))


@_command("inspect", "Count the zeros of a checkpoint on disk.")
def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder with safetensors files, sharded or not, or one such file.")
    ],
    by: Annotated[
        Literal["module", "block", "modality"], typer.Option(help="One row of the table for each.")
    ] = "block",
    pattern: Annotated[str | None, typer.Option(help="n:m pattern to check for, e.g. 2:4.")] = None,
    fail: Annotated[
        bool, typer.Option("--fail", help="Exit with status 1 if a module does not meet --pattern.")
    ] = False,
    json: Json = None,
    png: Png = None,
    quiet: Quiet = False,
) -> None:
    """Count the zeros of a checkpoint's linear layers. The model is read slice by slice and never loaded."""
    from .prune import inspect

    if not inspect(path, by, pattern, fail, Reporter(json, png, quiet)):
        raise typer.Exit(1)


@_command("merge", "Merge a SparseLoRA adapter into its base.", makes_folder=True)
def merge_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the base, dense or packed.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of a SparseLoRA adapter, as save_pretrained wrote it.")
    ],
    output: Output,
    packed: Annotated[
        bool | None, typer.Option("--packed/--dense", help="Form of the result. Left out: that of the base.")
    ] = None,
    license: License = None,
    push_to_hub: PushToHub = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Merge ADAPTER into BASE under its masks: every zero stays where it is.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. BASE and ADAPTER are not changed.
    """
    from .conversions import merge
    from .publishing import Publishing

    merge(base, adapter, output, packed, Publishing(push_to_hub, license), Reporter(json, None, quiet))


@_command("pack", "Store a 2:4 model in about half the bytes.", makes_folder=True)
def pack_command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of a 2:4 model, with config.json and safetensors files.")
    ],
    output: Output,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER",
            help="Layer that has to be 2:4: a name, a class, or re:EXPRESSION. Left out: all that are.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Layer to leave dense, given likewise.")
    ] = None,
    license: License = None,
    push_to_hub: PushToHub = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Pack the 2:4 linear layers of SOURCE: 0.5625 of their bytes in 16 bits, for `from_pretrained` to load.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. SOURCE is not changed.
    """
    from .conversions import pack
    from .publishing import Publishing

    publishing = Publishing(push_to_hub, license)
    pack(source, output, target, ignore or (), publishing, Reporter(json, None, quiet))


@_command("prune", "Make a dense model sparse.", makes_folder=True)
@_with_options(_method_options(), after="method")
def prune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder of the dense model.")],
    output: Output,
    method: Method = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights removed, in [0, 1).")] = None,
    pattern: Annotated[str | None, typer.Option(help="n:m pattern, n weights kept of every m: 2:4, 4:8.")] = None,
    modality_sparsity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AMOUNT",
            help="How much of one modality, e.g. vision=0.4 or language=2:4; repeat for more of them.",
        ),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Prune only this modality with --sparsity or --pattern; may be repeated."),
    ] = None,
    allocation: Annotated[
        Literal["uniform", "ecoflap"], typer.Option(help="ecoflap: less where the loss depends on the block more.")
    ] = "uniform",
    score_order: Annotated[
        Literal["zeroth", "first"], typer.Option(help="ecoflap: from loss differences or from gradients.")
    ] = "zeroth",
    target_module: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module to prune, by the end of its name.")
    ] = None,
    exclude_module: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module to leave dense, likewise.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|DIR|HUB",
            help="Calibration: text file, table (.csv, .tsv, .parquet, .json), .jsonl whose lines may name an image, "
            "data set on the Hub; for vision models a folder of images. Repeatable.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text, records or images to calibrate on.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or images in a batch.")] = 8,
    text_column: TextColumn = "text",
    split: Split = "train",
    propagate: Annotated[
        bool,
        typer.Option(
            "--propagate/--no-propagate",
            help="Calibrate each block on what the pruned blocks before it give, or on the dense ones.",
        ),
    ] = True,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the checkpoint is stored.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the model goes: auto, cpu, cuda:0; auto offloads.")] = "auto",
    seed: Seed = 0,
    license: License = None,
    push_to_hub: PushToHub = None,
    json: Json = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prune MODEL and save it with a report of its zeros. The output folder appears when all of it is written."""
    from ..sparsity import PruningConfig
    from .prune import PruneSettings, parse_amounts, prune_model
    from .publishing import Publishing

    config = PruningConfig(
        method=make_method(method, {name: value for name, value in options.items() if value is not None}),
        sparsity=sparsity,
        pattern=pattern,
        modality_sparsity=parse_amounts(modality_sparsity or []) or None,
        modalities=modality,
        allocation="modality" if modality_sparsity and allocation == "uniform" else allocation,
        score_order=score_order,
        target_modules=target_module,
        exclude_modules=exclude_module,
        propagate=propagate,
        seed=seed,
    )
    publishing = Publishing(push_to_hub, license)
    settings = PruneSettings(
        model=model,
        output=output,
        config=config,
        data=data or [],
        text_column=text_column,
        split=split,
        samples=samples,
        length=length,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        publishing=publishing,
    )
    prune_model(settings, Reporter(json, None, quiet))


@_command("restore", "Win back the quality of a pruned model.", makes_folder=True)
@_with_options(_run_options(), after="lr")
def restore_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Pruned model; or the dense one of an --adapter that stores masks.")
    ],
    data: Data,
    output: Output,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model. Not with stored masks, where MODEL itself is dense.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="SparseLoRA adapter to start from instead of a new one.")] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="λ of (1 − λ)·task + λ·KL to the dense model (0.1; 0 without one).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a new adapter (8).")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The update of a new adapter is scaled by alpha / rank (16).")
    ] = None,
    lr: Rate = 1e-3,
    json: Json = None,
    quiet: Quiet = False,
    **run: Any,
) -> None:
    """Restore a pruned MODEL with SparseLoRA, and write the adapter with a model card. Merged, it stays as sparse.

    Language models learn the text and follow the dense model's predictions; encoders and vision models follow its
    hidden states. Only pruned layers are adapted. Vision-language models: use DistillationTrainer in Python.
    """
    from .restore import RestoreJob, restore

    job = RestoreJob(
        model=model,
        data=data,
        output=output,
        teacher=teacher,
        adapter=adapter,
        kl_weight=kl_weight,
        rank=rank,
        alpha=alpha,
        lr=lr,
        **run,
    )
    restore(job, Reporter(json, None, quiet))


@_command("serve", "Serve embeddings at the ratio that load allows.")
def serve_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder of the text encoder.")],
    adapter: Annotated[str | None, typer.Option(help="Its Variator plugin; left out: the base alone.")] = None,
    slo_ms: Annotated[float, typer.Option(help="Milliseconds in which a request is to be answered.")] = 50.0,
    policy: Annotated[
        Literal["slack-fit", "threshold", "fixed"], typer.Option(help="What chooses the ratio of each batch.")
    ] = "slack-fit",
    ratio: Annotated[list[str] | None, _ratios("those it was trained for")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Latency table (JSON); measured and written if there is none.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most texts in a batch.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Most texts that wait; beyond it, status 429.")] = 1024,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts in a request.")] = 256,
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of a text; the rest is cut off.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request gets status 504.")] = 30.0,
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls, max or lasttoken; left out: as the model's folder says, else mean.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Vectors of length 1; left out: likewise, or yes."),
    ] = None,
    dtype: Dtype = "float32",
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; left out: MODEL.")] = None,
    host: Annotated[Literal["127.0.0.1", "0.0.0.0", "::"], typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port to listen on.")] = 8000,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Serve embeddings of MODEL over HTTP as OpenAI does, at the compression ratio that the load allows.

    /v1/embeddings, /v1/models, /health, and /metrics for Prometheus. An idle server answers with the base; the more
    texts wait, the larger the ratio that still answers in time. Needs the extra 'serve'.
    """
    from .serve import serve

    serve(
        Reporter(None, None, quiet),
        model=model,
        adapter=adapter,
        slo_ms=slo_ms,
        policy=policy,
        ratios=tuple(parse_ratios(ratio) or ()) or None,
        table=None if table is None else str(table),
        batch_size=batch_size,
        max_queue=max_queue,
        max_texts=max_texts,
        max_length=max_length,
        max_bytes=max_bytes,
        timeout=timeout,
        pooling=pooling,
        normalize=normalize,
        dtype=dtype,
        name=name,
        host=host,
        port=port,
        device=device,
    )


@_command("shrink", "Store a plugin in a few bits a number.", makes_folder=True)
def shrink_command(
    adapter: Plugin,
    output: Output,
    bits: Annotated[int, typer.Option(help="Bits of each number of the copied neurons, 4 or 8.")] = 4,
    base: Base = None,
    license: License = None,
    push_to_hub: PushToHub = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write ADAPTER with the neurons that it copies as rounded differences from its base's: far fewer bytes.

    For plugins that copy neurons whole (decompression 'neurons' without --correction-rank). It is as fast as before
    and loaded as before, onto the same base; its copies are not trained on. ADAPTER is not changed.
    """
    from .publishing import Publishing
    from .shrink import shrink

    shrink(adapter, output, bits, base, Publishing(push_to_hub, license), Reporter(json, None, quiet))


@_command("train", "Train a compression plugin for a model.", makes_folder=True)
@_with_options(_run_options(), after="flops_saved")
def train_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder of the base model.")],
    data: Data,
    output: Output,
    ratio: Ratio = None,
    adapter: Annotated[str | None, typer.Option(help="Plugin to start from instead of a new one.")] = None,
    lr: Rate = 2e-3,
    hidden_loss: Annotated[
        Literal["all", "last"], typer.Option(help="Hidden states to follow: of all layers, or the last.")
    ] = "all",
    logits_weight: Annotated[
        float | None, typer.Option(help="Weight of the KL of predictions beside that of hidden states, which is 1.")
    ] = None,
    bottleneck_dim: Annotated[int | None, typer.Option(help="A bottleneck of this width in a new plugin.")] = None,
    decompression: Annotated[
        Literal["bottleneck", "neurons"] | None,
        typer.Option(help="What gives each token its own in a new plugin: neurons (the default), or a bottleneck."),
    ] = None,
    correction_dim: Annotated[
        str | None, typer.Option(help="With neurons: how many, or their share of the network as in 0.25.")
    ] = None,
    correction_rank: Annotated[
        int | None, typer.Option(help="With neurons: train a low-rank update of them, which makes small files.")
    ] = None,
    compensation_rank: Annotated[
        int | None, typer.Option(help="Rank of updates of the blocks' maps, on only while the plugin merges.")
    ] = None,
    keep_last_tokens: Annotated[
        int | None,
        typer.Option(help="Last tokens of a text or prompt not to merge (1); for language models try 32."),
    ] = None,
    keep_outliers: Annotated[
        float | None,
        typer.Option(help="Share of a text's tokens not to merge, those that a probe tells, as in 0.1."),
    ] = None,
    layer_spans: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A-B",
            help="Merge around layers A to B whole, attention included, as in 0-11; for images, commas between spans.",
        ),
    ] = None,
    flops_saved: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the FLOPs to save as in 0.45, for each --ratio: ratios and widths by layer.",
        ),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    **run: Any,
) -> None:
    """Train a Variator plugin for MODEL on plain text or images, and write it with a model card.

    The plugin learns to give what the model gives without it, so the data needs no labels. Language models read the
    first part of each text and predict the rest. Quality is measured on held-out data before and after.

    On several processes: accelerate launch -m peft_variator train MODEL ...
    """
    ratios = parse_ratios(ratio)
    from .train import TrainJob, train

    job = TrainJob(
        model=model,
        data=data,
        output=output,
        ratio=ratios,
        adapter=adapter,
        lr=lr,
        hidden_loss=hidden_loss,
        logits_weight=logits_weight,
        bottleneck_dim=bottleneck_dim,
        decompression=decompression,
        correction_dim=correction_dim,
        correction_rank=correction_rank,
        compensation_rank=compensation_rank,
        keep_last_tokens=keep_last_tokens,
        keep_outliers=keep_outliers,
        layer_spans=parse_spans(layer_spans),
        flops_saved=parse_shares(flops_saved),
        **run,
    )
    train(job, Reporter(json, None, quiet))


@_command("unpack", "Make a packed model dense.", makes_folder=True)
def unpack_command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of a model packed by this package or published packed.")
    ],
    output: Output,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Make SOURCE dense, its zeros stored as such, for engines that know nothing of 2:4.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. SOURCE is not changed.
    """
    from .conversions import unpack

    unpack(source, output, Reporter(json, None, quiet))


if __name__ == "__main__":
    app()
