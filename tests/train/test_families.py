"""Model families, by tiny random models of their shapes.

1. All matrices of a family are clustered (but routers), and the packed file loads as the trained model, in every way of loading.
2. Gradients are those of the equations, in every implementation of experts; a weight is clustered once in a forward.
3. Embeddings of any subclass may be tied to other modules in any order.
4. Models of pictures learn while clustered, and their file is the model.
"""

import collections
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import CONFIG, FAMILIES, IDS, build, loss_of
from torch import nn

import edkm
from edkm.compressed import checkpoint, pretrained
from edkm.core.assign import as_matrix
from edkm.train.clustering import Clustering
from edkm.train.prepare import clusterings, unclustered
from edkm.train.targets import NO_WEIGHT

# Matrices that are left alone; all others must be clustered.
ROUTERS = {
    "mixtral": ("mlp.gate.weight",),
    "qwen2_moe": ("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
    "qwen3_moe": ("mlp.gate.weight",),
    "gpt_oss": ("mlp.router.weight", "experts.gate_up_proj_bias", "experts.down_proj_bias"),
}


def reference_gradients(plain, prepared):
    """Compute loss and gradients by autograd through the equations, from the state of a prepared model, which is not moved."""
    leaves, soft = {}, {}
    for name, weight, clustering in clusterings(prepared):
        leaves[name] = weight.detach().clone().requires_grad_()
        result = edkm.cluster(
            as_matrix(leaves[name], clustering.row_axes),
            clustering.centroids.clone(),
            temperature=clustering.current_temperature(),
            importance=clustering.importance,
            max_iters=clustering.config.max_iters,
            backend="reference",
        )
        soft[name] = result.weight.view(weight.shape)
    out = torch.func.functional_call(plain, soft, kwargs={"input_ids": IDS, "labels": IDS})
    return out.loss, dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), strict=True))


def trained(model, steps, optimizer, loss_of):
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# From a model to a file, and back.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_clustered_and_its_file_is_the_model(family, tmp_path):
    model = build(family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    importance = edkm.calibrate(model, [{"input_ids": IDS}])
    config = dataclasses.replace(CONFIG, skip=("*shared_expert_gate",) if family == "qwen2_moe" else ())
    report = edkm.prepare(model, config, importance=importance)
    trained(model, 2, torch.optim.SGD(model.parameters(), lr=0.1), loss_of)
    assert {entry.name: entry.shape for entry in report.entries} == shapes
    left = {entry.name: entry.note for entry in report.skipped if entry.note != "a vector"}
    ends = ROUTERS.get(family, ())
    assert len(left) == 2 * len(ends) and all(name.endswith(ends) for name in left)
    assert set(left.values()) <= {NO_WEIGHT, "matches skip"}

    frozen = edkm.freeze(model)
    assert frozen.keys() == {entry.name for entry in report.clustered}
    pretrained.save_pretrained(tmp_path / "packed", frozen, unclustered(model), config.to_json(), model)
    quantization = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == (2 if any(len(shape) == 3 for shape in shapes.values()) else 1)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        assert torch.equal(pretrained.load(tmp_path / "packed")(input_ids=IDS).logits, logits)
        packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        torch.testing.assert_close(packed(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
        pretrained.unpack(tmp_path / "packed", tmp_path / "dense")
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
        assert torch.equal(dense(input_ids=IDS).logits, logits)


CASES = [(family, None) for family in ("gemma3_text", "phi3", "gpt2", "llama4_text")]
CASES += [(family, how) for family in ("mixtral", "gpt_oss") for how in ("eager", "batched_mm", "grouped_mm")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)))
def family_model(request):
    family, experts = request.param
    model = build(family)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


def test_gradients_are_those_of_the_equations(family_model):
    plain, model = family_model, copy.deepcopy(family_model).train()
    edkm.prepare(model, CONFIG, importance=edkm.calibrate(model, [{"input_ids": IDS}]))
    expected, gradients = reference_gradients(plain.train(), model)
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight, _ in clusterings(model):
        wanted = gradients[name]
        assert wanted.norm() > 0 and (weight.grad - wanted).norm() < 1e-3 * wanted.norm(), name


# Embeddings.


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class Ties(nn.Module):
    """A weight that two modules share, in either order and of any class."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, ids):
        modules = {isinstance(m, nn.Embedding): m for m in (self.first, self.second)}
        x = modules[True](ids)
        return modules[False](x) if False in modules else self.first(ids) + self.second(ids)


@pytest.mark.parametrize(("first", "second"), [("scaled", "linear"), ("linear", "scaled"), ("scaled", "scaled"), ("plain", "scaled")])
def test_a_subclass_of_embedding_may_be_tied_in_any_order(first, second):
    kinds = {"scaled": (Scaled, 12, 8), "plain": (nn.Embedding, 12, 8), "linear": (nn.Linear, 8, 12, False)}
    torch.manual_seed(0)
    model = Ties(*(kind(*shape) for kind, *shape in (kinds[first], kinds[second])))
    plain, ids = copy.deepcopy(model), torch.tensor([[0, 3, 3, 11]])
    report = edkm.prepare(model, edkm.ClusterConfig(embedding_bits=3))
    assert [entry.name for entry in report.entries] == ["first.weight"] and len(report.clustered) == 1
    assert list(edkm.freeze(model)) == ["first.weight"] and unclustered(model) == {}
    assert sum("centroids" in name for name in model.state_dict()) == 1
    ((_, weight, clustering),) = clusterings(model)
    leaf = weight.detach().clone().requires_grad_()
    soft = edkm.cluster(leaf, clustering.centroids.clone(), temperature=clustering.temperature, max_iters=1, backend="reference").weight
    expected = torch.func.functional_call(plain, {"first.weight": soft}, (ids,))
    (gradient,) = torch.autograd.grad(expected.square().sum(), leaf)
    out = model(ids)
    out.square().sum().backward()
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(weight.grad, gradient, rtol=1e-4, atol=1e-4)
    hard = torch.func.functional_call(plain, {"first.weight": clustering.hard(weight)}, (ids,))
    assert torch.equal(model.eval()(ids), hard)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids), hard) and list(edkm.freeze(twin)) == ["first.weight"]


def test_a_weight_is_clustered_once_in_a_forward(family_model, monkeypatch):
    model, counts = family_model, collections.Counter()
    edkm.prepare(model, CONFIG)

    def count(method):
        plain = getattr(Clustering, method)

        def counted(self, *args):
            counts[method, id(self)] += 1
            return plain(self, *args)

        monkeypatch.setattr(Clustering, method, counted)

    for method in ("_solve", "decode", "hard"):
        count(method)
    names = {id(clustering): name for name, _, clustering in clusterings(model)}
    # A linear layer decodes again in backward; so does the head that shares its weight with the embedding of Gemma, which reads it twice.
    once = {key: 1 for key, name in names.items() if "experts" in name or ".c_" in name}
    wanted = once | {key: 3 for key, name in names.items() if model.config.model_type == "gemma3_text" and "embed" in name}
    loss_of(model.train()).backward()
    assert all(counts["_solve", key] == 1 for key in names)
    assert wanted.items() <= {key: counts["decode", key] for key in names}.items() and (wanted or model.config.model_type == "phi3")
    with torch.no_grad():
        loss_of(model.eval())
    assert all(counts["hard", key] == 1 for key in once)


# Not only language models.


def quadrants(count, size=16, seed=0):
    """Noisy pictures with one bright quarter, and which it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    pictures = torch.randn(count, 1, size, size, generator=generator)
    half = size // 2
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        row, col = label // 2 * half, label % 2 * half
        picture[0, row : row + half, col : col + half] += 1.0
    return pictures, labels


def vit():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**shape, image_size=16, patch_size=4, num_channels=1, num_labels=4)
    )


def resnet():
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, num_channels=1, num_labels=4))


def convnet():
    convolutions = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.parametrize("make", [vit, resnet, convnet])
def test_models_of_pictures_learn_and_their_file_is_the_model(make, tmp_path):
    def logits(model, pictures):
        out = model(pictures)
        return getattr(out, "logits", out)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, fresh = make(), make()
    pictures, labels = quadrants(128)
    steps = 40
    config = edkm.ClusterConfig(bits=3, rows_per_lut=4, anneal_steps=steps)
    importance = edkm.calibrate(model, [pictures])
    report = edkm.prepare(model, config, importance=importance)
    # Every linear layer and every convolution; not the class token and the positions of a ViT.
    assert {e.name for e in report.clustered} == {f"{n}.weight" for n, m in fresh.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert all("no importance" not in entry.note for entry in report.clustered)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = trained(model, steps, optimizer, lambda model: F.cross_entropy(logits(model, pictures), labels))
    assert losses[-1] < losses[0] / 5

    quantization = checkpoint.write(tmp_path, edkm.freeze(model), unclustered(model), config.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    packed = checkpoint.read(tmp_path)
    fresh.load_state_dict({**packed.dense, **{name: checkpoint.dequantize(tensor) for name, tensor in packed.frozen.items()}})
    unseen, answers = quadrants(256, seed=1)
    with torch.no_grad():
        assert torch.equal(logits(fresh.eval(), unseen), logits(model.eval(), unseen))
        assert (logits(fresh, unseen).argmax(1) == answers).float().mean() > 0.9
