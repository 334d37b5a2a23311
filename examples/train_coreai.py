"""Train a model that Apple's coreai-opt palettizes, with edkm's clustering, and finalize it for Core ML."""

import torch
from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig, PalettizationSpec

from edkm.coreai import EdkmTrainingSpec

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
x = torch.randn(256, 64)
spec = PalettizationSpec(n_bits=3, training_strategy_spec=EdkmTrainingSpec(anneal_steps=20))
config = KMeansPalettizerConfig(global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}))
palettizer = KMeansPalettizer(model, config)
model = palettizer.prepare((x,))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with palettizer.training_mode():
    for _ in range(20):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        palettizer.step()
model.eval()  # weights on their nearest centroids; finalize() exports these
palettizer.finalize(backend=ExportBackend.CoreML)
print(f"loss {(model(x) - x).square().mean():.4f}, {model[0].weight.unique().numel()} values in the first weight")
