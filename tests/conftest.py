"""Models and tokenizers small enough to make in the test: nothing is downloaded."""

import json
import os
import shutil
import sys
from pathlib import Path

# There are as many workers as cores: threads of one would only wait for those of another, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads this when it is imported, which torch may do at any time: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 300


@pytest.fixture(autouse=True)
def _compiler(request):
    """A case of the backend `native` needs one."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "native" in callspec.params.values():
        from edkm.core import native

        if not native.available():
            pytest.skip("no C compiler")


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog and the other dog"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def tiny_tokenizer():
    """Byte-level BPE of at most 300 tokens, no chat template; encodes any text and decodes it unchanged."""
    return _tokenizer()


@pytest.fixture
def chat_tokenizer():
    """The same tokenizer with a chat template of the usual kind."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def bos_tokenizer():
    """The same tokenizer, which puts `<|start|>` before every text, as Llama's and Gemma's do theirs."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer()
    tokenizer.bos_token = "<|start|>"
    form = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = form
    return tokenizer


def _model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_model():
    """A random LLaMA, always the same: 2 layers, hidden size 64, tied embeddings, float32, context of 256."""
    return _model()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """An ordinary checkpoint of `tiny_model` with `chat_tokenizer`. Shared: do not write there."""
    directory = tmp_path_factory.mktemp("tiny")
    _model().save_pretrained(directory)
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def packed_dir(tmp_path_factory):
    """The same packed: the feed-forward weights at 3 bits, one table each, untrained. Do not write there."""
    from edkm.compressed import pretrained
    from edkm.core.assign import Frozen, assign, round_lut

    model, frozen, dense = _model(), {}, {}
    for name, weight in model.named_parameters():
        weight = weight.detach()
        if ".mlp." in name:
            lut = round_lut(weight.flatten().quantile(torch.linspace(0.03, 0.97, 8)).view(1, 8, 1))
            frozen[name] = Frozen(assign(weight, lut), lut, tuple(weight.shape), 0.0125)
        else:
            dense[name] = weight
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    directory = tmp_path_factory.mktemp("packed")
    pretrained.save_pretrained(directory, frozen, dense, {}, model, tokenizer)
    return directory


@pytest.fixture
def data(tmp_path):
    """Training data for `edkm compress`: 24 short answers."""
    records = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 28)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path / "train.json"


@pytest.fixture
def solves(monkeypatch):
    """Counts the clusterings that layers solve."""
    from edkm.train import clustering

    calls, solve = [], clustering.solve

    def counted(*args):
        calls.append(args)
        return solve(*args)

    monkeypatch.setattr(clustering, "solve", counted)
    return calls


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A packed LLaMA and the dense model that it stands for. Shared: do not write there."""
    from packed import make, pack

    directory = tmp_path_factory.mktemp("llama")
    return directory, pack(make("llama"), directory)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request, tmp_path_factory):
    """The same, with tied embeddings and without."""
    from packed import make, pack

    directory = tmp_path_factory.mktemp("tied")
    return directory, pack(make("llama", tie_word_embeddings=request.param), directory)


@pytest.fixture
def ninja(monkeypatch):
    """coreai-opt compiles its k-means with the ninja in the folder of python."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])


@pytest.fixture(scope="session")
def places(tmp_path_factory, tiny_dir):
    """Data, a held-out text, and a recorded run in `packed`. Shared: do not write there."""
    from pages import RECORDS, arguments

    from edkm.cli import main

    root = tmp_path_factory.mktemp("report")
    text = root / "held <out>.txt"
    (root / "train.json").write_text(json.dumps(RECORDS))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    assert main(arguments(tiny_dir, root, root / "packed", "--steps", "8", "--lr", "1e-3", "--eval-text", str(text))) == 0
    return root


@pytest.fixture
def copy(places, tmp_path):
    """The recorded directory, to be changed."""
    return shutil.copytree(places / "packed", tmp_path / "copy")
