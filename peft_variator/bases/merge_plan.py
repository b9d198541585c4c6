"""What becomes of every weight of a base that an adapter is merged into."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .config import Sparse24Config
from .folder import ModelFolder
from .locate import LocatedAdapter
from .names import KeyNames
from .pieces import dense_piece, own_dtype, planned_piece, replaced_piece
from .plan import PlannedWeight, Rules, is_free_linear, plan_weight
from .shards import Piece
from .stored import StoredWeight
from .updates import LayerUpdate, MergeJob, merged_piece


__all__ = ["MergePlan"]


@dataclass(frozen=True)
class MergePlan:
    """The pieces of a merged checkpoint.

    Args:
        pieces: all that is not copied as it is.
        packed_layers: name in the model of every layer that is packed in the result.
        unmasked: names of the weights in which nothing was masked; known when the pieces are made.
    """

    pieces: list[Piece]
    packed_layers: list[str]
    unmasked: list[str]

    @classmethod
    def make(cls, folder: ModelFolder, model: PreTrainedModel, located: LocatedAdapter, packed: bool) -> MergePlan:
        """Decide about every weight, and check all that can be checked without reading them.

        Args:
            folder: the base.
            model: the dense model of its config.json.
            located: what the adapter changes.
            packed: whether the result is to be packed.

        Raises:
            CheckpointError: a weight of the base is damaged, or a mask is not 2:4 and `packed` is True.
        """
        planner = _Planner(folder, model, located, packed)
        pieces = [piece for weight in located.weights.values() if (piece := planner.piece(weight)) is not None]
        return cls(pieces, planner.packed_layers, planner.unmasked)


class _Planner:
    def __init__(self, folder: ModelFolder, model: PreTrainedModel, located: LocatedAdapter, packed: bool) -> None:
        self._model, self._names, self._located, self._packed = model, KeyNames(model), located, packed
        self._published, self._dtype = folder.published, folder.dtype()
        published = folder.published or Sparse24Config(format="dense")
        self._rules = Rules(
            pack_dense=published.format == "dense",
            targets=None if published.targets is None else tuple(published.targets),
            ignore=tuple(published.ignore),
        )
        self.packed_layers: list[str] = []
        self.unmasked: list[str] = []

    def piece(self, weight: StoredWeight) -> Piece | None:
        """The piece for one weight; None where it is copied."""
        new = self._located.replaced.get(weight.name)
        if new is not None:
            return replaced_piece(weight, own_dtype(weight, self._dtype), new)
        planned = self._plan(weight)
        becomes_packed = planned is not None and planned.action != "dense" and self._packed
        update = self._located.updates.get(weight.name)
        if update is not None:
            return self._merged(weight, update, planned, becomes_packed)
        if planned is not None and becomes_packed:
            self.packed_layers.append(planned.module)
            return None if planned.action == "as_is" else planned_piece(planned)
        if weight.plain or (planned is None and self._packed):
            return None
        return dense_piece(weight, own_dtype(weight, self._dtype if planned is None else planned.dtype))

    def _plan(self, weight: StoredWeight) -> PlannedWeight | None:
        """What loading the base, or packing a dense one, makes of the weight."""
        if self._published is None and not self._packed:
            return None
        return plan_weight(self._model, self._names, weight, self._rules, self._dtype)

    def _merged(
        self, weight: StoredWeight, update: LayerUpdate, planned: PlannedWeight | None, becomes_packed: bool
    ) -> Piece:
        if update.mask is not None:
            becomes_packed = self._packed and self._can_be_packed(weight) and update.stores_two_four()
        if becomes_packed:
            self.packed_layers.append((self._names.parameter(weight.name) or "").rpartition(".")[0])
        job = MergeJob(
            weight=weight,
            update=update,
            dtype=own_dtype(weight, self._dtype if planned is None else planned.dtype),
            from_packed=self._published is not None and planned is not None and planned.action != "dense",
            to_packed=becomes_packed,
            unmasked=self.unmasked,
        )
        return merged_piece(job)

    def _can_be_packed(self, weight: StoredWeight) -> bool:
        parameter = self._names.parameter(weight.name)
        if parameter is None:
            return False
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        return is_free_linear(self._model, module, parameter) and not self._rules.ignores(module, weight.module)
