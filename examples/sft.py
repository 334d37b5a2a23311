"""TRL's SFTTrainer, with one more argument: `python examples/sft.py [MODEL]` writes ./packed"""

import sys
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import edkm

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
# The reference of the Python that runs this.
records = [{"prompt": f"Explain Python's {topic}.\n", "completion": text[:1000]} for topic, text in topics.items()]

schedule = {"max_steps": 40, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
arguments = SFTConfig("training", max_length=512, bf16=torch.cuda.is_available(), **schedule)
callback = edkm.Callback("packed", edkm.ClusterConfig(bits=3, rows_per_lut=1))
SFTTrainer(model, arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer, callbacks=[callback]).train()
