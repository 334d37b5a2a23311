"""Train weights that Apple's coreai-opt palettizes: the training strategy "edkm".

    spec = PalettizationSpec(n_bits=3, training_strategy_spec=edkm.coreai.EdkmTrainingSpec(anneal_steps=100))

coreai-opt chooses the weights, finds the first tables (weighted by its sensitivities, if it has any) and exports. In training the weight
is softly clustered here, with the exact gradient; in evaluation every weight takes its nearest centroid in tables of float16, the same
tables and indices that `edkm.freeze` would give.

A strategy's public contract is `train_forward(module, weight)` alone. A module with this strategy becomes a `_ClusteredPalettizer` when
it is first trained, or by `attach`, for three things more: the nearest centroid for every weight (coreai-opt's search by `cdist` missed
it for 0.5% of a million weights at 8 bits), a state that begins anew when coreai-opt clusters anew, and an error if `finalize` would
export soft weights.

A weight that does not fit its spec (rows that do not divide by `group_size` or `cluster_dim`) stays dense: coreai-opt's `prepare` logs
that and leaves no trace in the model. Such names are missing from the list that `attach` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize  # pyright: ignore[reportMissingImports]
from coreai_opt.palettization.spec import TrainingStrategy, TrainingStrategySpec  # pyright: ignore[reportMissingImports]
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edkm.config import ClusterConfig
from edkm.core.assign import assign, round_lut
from edkm.core.op import check_shapes
from edkm.core.reference import compute_dtype
from edkm.train.clustering import Clustering
from edkm.train.layers import clustered_weight

# coreai-opt's own weighted k-means divides by the importance of a cluster; its calibration has the same floor.
_LEAST_IMPORTANCE = 1e-12


class EdkmStrategy(nn.Module, TrainingStrategy):
    """The forward pass of training, as a module: its state is saved with the model's.

    `clustering` is None until the weight is first trained or `attach`ed.

    Cost:
        Keeps for backward what the layer keeps of its weight, plus the centroids of each iteration.
    """

    clustering: Clustering | None

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.register_module("clustering", None)

    def train_forward(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Cluster a weight softly, with the exact gradient; one k-means step for every step of the optimizer."""
        if self.clustering is None:
            _adopt(module, weight, None)
        assert self.clustering is not None
        soft = clustered_weight(weight, self.clustering)
        _show(module, self.clustering)
        return soft

    def start(self, module: _KMeansFakePalettize, weight: Tensor) -> None:
        """Begin from the tables and the sensitivities that coreai-opt's module holds."""
        config, matrix = _settings(module, weight), weight.detach().flatten(1)
        centroids = module.centroids.to(compute_dtype(weight.dtype))
        if config.dim == 1:
            centroids = centroids.sort(dim=1).values
        importance = module.sensitivities
        if importance is not None:
            # One row that was expanded to the weight's shape stays one row in checkpoints.
            importance = (importance if importance.stride(0) else importance[:1]).flatten(1).contiguous()
        try:
            check_shapes(matrix, centroids, importance)
        except ValueError as error:
            raise ValueError(f"{module.tensor_fqn}: {str(error).removeprefix('weight: ')}") from None
        self.clustering = Clustering(matrix, config, importance, centroids=centroids)
        self.clustering.train(self.training)
        _show(module, self.clustering)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        saved = f"{prefix}clustering.importance"
        if self.clustering is None and f"{prefix}clustering.step" in state_dict:
            error_msgs.append(f"{prefix}clustering: call edkm.coreai.attach(model) after prepare(), before a trained state is loaded.")
        elif self.clustering is not None and self.clustering.importance is None and saved in state_dict:
            # coreai-opt's sensitivities are not part of a checkpoint, but the importance made of them is.
            self.clustering.importance = torch.empty_like(state_dict[saved], device=self.clustering.centroids.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


@TrainingStrategySpec.register("edkm")
class EdkmTrainingSpec(TrainingStrategySpec):
    """Settings of the strategy, as in `edkm.ClusterConfig`; bits, `cluster_dim` and granularity are the `PalettizationSpec`'s.

    Attributes:
        softness: temperature in units of the quantisation error; 0 trains straight through the hard assignment.
        anneal: factor on the temperature at the end of training, reached geometrically.
        anneal_steps: optimizer steps until then; 0 for never.
        max_iters: k-means iterations per optimizer step.

    Raises:
        ValueError: a value out of range.
    """

    _strategy_cls = EdkmStrategy

    softness: float = ClusterConfig.softness
    anneal: float = ClusterConfig.anneal
    anneal_steps: int = ClusterConfig.anneal_steps
    max_iters: int = ClusterConfig.max_iters

    @model_validator(mode="after")
    def _check(self) -> EdkmTrainingSpec:
        ClusterConfig(**{name: getattr(self, name) for name in type(self).model_fields})
        return self


class _ClusteredPalettizer(_KMeansFakePalettize):
    """coreai-opt's module with edkm's tables and nearest centroids."""

    _assigned: tuple[Any, ...] | None = None  # the weight that the indices are of

    def _initialize(self, weight: Tensor) -> None:
        super()._initialize(weight)
        self._training_strategy.start(self, weight)

    def hard_assign(self, weight: Tensor) -> Tensor:
        # coreai-opt would keep the indices of an evaluation between a forward pass and the optimizer's step.
        state = self._training_strategy.clustering._state_of(weight)
        if self._assigned != state:
            self._assigned, self._indices_stale = state, True
        return super().hard_assign(weight)

    def _assign_indices(self, original_weights: Tensor, centroids: Tensor) -> Tensor:
        # From the tables in float16: `centroids` has the dtype of the weight, which may be coarser.
        indices = assign(original_weights.flatten(1), round_lut(self._training_strategy.clustering.centroids))
        return indices.view(-1, *original_weights.shape[1:]).cpu()

    @property
    def lut(self) -> Tensor | None:
        if self.training:
            raise RuntimeError(
                f"{self.tensor_fqn}: in training mode the weight is soft and has no table. Call model.eval() before finalize()."
            )
        return super().lut


def attach(model: nn.Module, importance: Mapping[str, Tensor] | None = None) -> list[str]:
    """Give the weights that coreai-opt has prepared for this strategy their state, before the first training step, in place.

    Needed to weigh by importance, and to load a trained state. Clusters anew if there is importance; earlier state is dropped.

    Args:
        model: as `KMeansPalettizer.prepare` returned it.
        importance: name of every such weight -> non-negative, broadcastable to `weight.flatten(1)`, as `edkm.calibrate` returned it
            for the model before `prepare`. None: the sensitivities of coreai-opt, if it has calibrated any.

    Returns:
        The names of the weights; one that coreai-opt has skipped is missing.

    Raises:
        ValueError: no weight has this strategy, `importance` has no entry for a weight or one that does not fit, or settings that edkm
            does not have. The model is as it was.

    Cost:
        A few passes over each weight; with importance, one k-means of coreai-opt's.
    """
    found = {}
    for module in filter(parametrize.is_parametrized, model.modules()):
        chains: Any = module.parametrizations
        for chain in chains.values():
            for step in chain:
                if isinstance(step, _KMeansFakePalettize) and isinstance(step._training_strategy, EdkmStrategy):
                    found[step] = chain.original  # tied weights share one
    if not found:
        raise ValueError(
            "model: no weight has the strategy, or its rows do not divide by group_size (coreai-opt logs which). "
            "Prepare it with PalettizationSpec(training_strategy_spec=EdkmTrainingSpec())."
        )
    weigh = {step: _importance(step.tensor_fqn, weight, importance) for step, weight in found.items()}
    for step, weight in found.items():
        _settings(step, weight)
    for step, weight in found.items():
        _adopt(step, weight, weigh[step])
    return [step.tensor_fqn for step in found]


def _importance(name: str, weight: Tensor, given: Mapping[str, Tensor] | None) -> Tensor | None:
    """Bring an importance to the form of coreai-opt's sensitivities: the shape of the weight, at most 1, never 0."""
    if given is None:
        return None
    if name not in given:
        raise ValueError(f"{name}: importance has no entry for it. Calibrate it, or give torch.ones(1, 1).")
    importance, shape = given[name], (weight.shape[0], weight[0].numel())
    try:
        whole = importance.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: importance {list(importance.shape)} does not broadcast to the weight {list(shape)}.") from None
    if not bool(((importance >= 0) & importance.isfinite()).all()) or not bool((importance > 0).any()):
        raise ValueError(f"{name}: importance must be finite, not negative, and not all zero. Mean squared inputs are.")
    return (importance / importance.max()).clamp_min(_LEAST_IMPORTANCE).expand(whole.shape).view(weight.shape)


def _adopt(module: Any, weight: Tensor, importance: Tensor | None) -> None:
    """Make `module` a `_ClusteredPalettizer`, with state."""
    _settings(module, weight)
    module.__class__ = _ClusteredPalettizer
    if importance is None:
        module._training_strategy.start(module, weight.detach())
    else:
        module.sensitivities = importance
        module.ensure_initialized(weight.detach())


def _settings(module: _KMeansFakePalettize, weight: Tensor) -> ClusterConfig:
    """Read the settings of the `PalettizationSpec` and of the strategy; refuse those that edkm does not have."""
    axis = module.granularity.axis
    for wrong, message in (
        (weight.ndim < 2, f"edkm clusters matrices and convolutions, got {list(weight.shape)}. Leave it out of op_state_spec."),
        (module.lut_qspec is not None, "edkm's tables are float16, and lut_qspec would quantize them after training. Set lut_qspec=None."),
        (
            module.sparsity_detection_threshold is not None,
            "edkm clusters all weights, zeros too. Set sparsity_detection_threshold=None in the PalettizationSpec.",
        ),
        (
            module.enable_per_channel_scale,
            "edkm clusters weights as they are. Set enable_per_channel_scale=False; "
            "PerGroupedChannelGranularity(axis=0, group_size=1) gives every channel its own table.",
        ),
        (axis, f"edkm's tables are shared by rows, got axis={axis}. Use PerGroupedChannelGranularity(axis=0)."),
    ):
        if wrong:
            raise ValueError(f"{module.tensor_fqn}: {message}")
    rows = getattr(module.granularity, "group_size", 0)
    return ClusterConfig(bits=module.n_bits, dim=module.cluster_dim, rows_per_lut=rows, **module._training_strategy.settings)


def _show(module: _KMeansFakePalettize, clustering: Clustering) -> None:
    """Put the tables, as stored in float16, where coreai-opt exports from; its indices wait for evaluation."""
    module.centroids = round_lut(clustering.centroids).to(module.centroids.dtype)
    module._indices_stale = True
