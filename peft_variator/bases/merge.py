"""Merging a SparseLoRA adapter into its base on disk, without loading the model."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .checkpoint import CheckpointError
from .folder import ModelFolder
from .locate import locate_adapter
from .merge_plan import MergePlan
from .pieces import layers_left_dense
from .saved_adapter import SavedAdapter
from .shards import ConversionReport, OnProgress, fingerprint, rewrite


__all__ = ["MergeReport", "merge_checkpoint"]


@dataclass(frozen=True)
class MergeReport(ConversionReport):
    """What a merge did.

    Args:
        merged: how many weights got an update under their mask.
        replaced: how many other tensors of the base the adapter has new values for.
        packed: how many layers are packed in the result; 0 for a dense one.
        unmasked: names of merged weights of which the base prunes nothing, so that the whole update went in; those of
            an interrupted run are not among them.
    """

    merged: int
    replaced: int
    packed: int
    unmasked: tuple[str, ...] = ()


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    packed: bool | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> MergeReport:
    """Put a SparseLoRA adapter into its base, W ← (W + s·B·A) ⊙ M (arXiv 2404.02424), in a new model folder.

    The result is that of `merge_and_unload(safe_merge=True)` in memory: sums are made in float32 and rounded once, and
    every zero of M is +0.0. The biases that the adapter trained, and its `modules_to_save`, take the place of the
    base's; other tensors and files are copied. M is the one in memory, too: the bitmask of a packed base, the non-zero
    weights of a dense one, or what the adapter stores. See `rewrite` for memory, and for what happens when it is
    interrupted. Nothing in `base` and `adapter` is written.

    Args:
        base: folder with config.json and safetensors files, dense or in any layout that `load_base` reads.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        output: the folder to make.
        packed: write the packed form, or the dense one, whose config.json says nothing of sparsity; None keeps the
            form of the base.
        on_progress: called with the bytes done and those there are.

    Raises:
        CheckpointError: a file is damaged; the adapter is none of SparseLoRA, does not fit the base or was made for
            another one; its masks are not 2:4, or nothing is, and `packed` is True. The message names file and tensor.
        FileExistsError: `output` exists and is not empty.
    """
    folder, saved = ModelFolder.open(base), SavedAdapter.open(adapter)
    located = locate_adapter(folder, saved)
    if packed is None:
        packed = any(weight.layout != "dense" for weight in located.weights.values())
    model = folder.skeleton()
    plan = MergePlan.make(folder, model, located, packed)
    config = folder.config
    if packed:
        if not plan.packed_layers:
            raise CheckpointError(
                f"{folder.path}: no linear layer of {type(model).__name__} is 2:4 with {saved.path}, so there is "
                "nothing to pack. Merge to the dense form."
            )
        config = folder.packed_config(layers_left_dense(model, folder.checkpoint, plan.packed_layers))
    job = {"task": "merge", "adapter": fingerprint(saved.files), "packed": packed}
    report = rewrite(folder, output, plan.pieces, config, job, on_progress)
    return MergeReport(
        output=report.output,
        converted=report.converted,
        bytes_before=report.bytes_before,
        bytes_after=report.bytes_after,
        merged=len(located.updates),
        replaced=len(located.replaced),
        packed=len(plan.packed_layers),
        unmasked=tuple(plan.unmasked),
    )
