"""edkm: compress language models while they are fine-tuned, by weight clustering."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edkm._version import __version__ as __version__
from edkm.register import register

if TYPE_CHECKING:
    from edkm import offload as offload
    from edkm.config import ClusterConfig as ClusterConfig
    from edkm.core.kmeans import initial_centroids as initial_centroids
    from edkm.core.op import choose_backend as choose_backend
    from edkm.core.op import cluster as cluster
    from edkm.train.allocate import allocate as allocate
    from edkm.train.calibrate import calibrate as calibrate
    from edkm.train.callback import Callback as Callback
    from edkm.train.clustering import soft_weights as soft_weights
    from edkm.train.fit import fit as fit
    from edkm.train.layerwise import LayerTraining as LayerTraining
    from edkm.train.prepare import freeze as freeze
    from edkm.train.prepare import prepare as prepare
    from edkm.train.save import save as save
    from edkm.train.sharding import distribute as distribute

# Imported when first used, so that `edkm --help` does not wait for torch.
_HOME = {
    "Callback": "edkm.train.callback",
    "ClusterConfig": "edkm.config",
    "LayerTraining": "edkm.train.layerwise",
    "allocate": "edkm.train.allocate",
    "calibrate": "edkm.train.calibrate",
    "choose_backend": "edkm.core.op",
    "cluster": "edkm.core.op",
    "distribute": "edkm.train.sharding",
    "fit": "edkm.train.fit",
    "freeze": "edkm.train.prepare",
    "initial_centroids": "edkm.core.kmeans",
    "prepare": "edkm.train.prepare",
    "save": "edkm.train.save",
    "soft_weights": "edkm.train.clustering",
}

__all__ = sorted([*_HOME, "__version__", "offload"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "offload":
        return import_module("edkm.offload")
    if name not in _HOME:
        raise AttributeError(f"module 'edkm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


register()
