"""A training loop of your own: prepare, train as always, save. `python examples/plain_loop.py [MODEL]` writes ./packed"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import edkm

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
ids = torch.tensor(tokenizer("\n\n".join(topics.values())).input_ids)  # the reference of the Python that runs this
blocks = ids[: len(ids) // 256 * 256].view(-1, 1, 256)

config = edkm.ClusterConfig(bits=3, rows_per_lut=1, anneal_steps=40)
calibration = [{"input_ids": block} for block in blocks[:32]]
edkm.prepare(model, config, calibration)

optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
for step in range(40):
    block = blocks[step % len(blocks)]
    model(input_ids=block, labels=block).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
edkm.save(model, "packed", tokenizer)
