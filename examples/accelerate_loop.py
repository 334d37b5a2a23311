"""A loop with Accelerate, in one process or with DDP: `accelerate launch examples/accelerate_loop.py [MODEL]` writes ./packed"""

import sys
from itertools import cycle
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import edkm

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
ids = torch.tensor(tokenizer("\n\n".join(topics.values())).input_ids)  # the reference of the Python that runs this
blocks = ids[: len(ids) // 256 * 256].view(-1, 256)

accelerator, config = Accelerator(), edkm.ClusterConfig(bits=3, rows_per_lut=1, anneal_steps=40)
calibration = [{"input_ids": block.unsqueeze(0).to(accelerator.device)} for block in blocks[:32]]
edkm.prepare(model.to(accelerator.device), config, calibration)

optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
loader = torch.utils.data.DataLoader(blocks, batch_size=2, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
if accelerator.num_processes > 1:
    edkm.distribute(accelerator.unwrap_model(model))  # all processes hold the same tables
for _, block in zip(range(40), cycle(loader)):
    accelerator.backward(model(input_ids=block, labels=block).loss)
    optimizer.step()
    optimizer.zero_grad()
edkm.save(model, "packed", tokenizer)
