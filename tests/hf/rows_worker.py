"""Jobs of several processes for ``test_rows.py``, started by torchrun or alone: ``rows_worker.py FILE '{name: fields of Job, ...}'``.

Each process writes, as a line of FILE, what its jobs came to: ``{rank, name: {answers, losses, said, kept} or error}``, where ``kept`` is
the share of the frozen weights in blocks that it holds right after the load.
"""

import json
import os
import sys
import warnings

import torch

from minilora import LoraConfig
from minilora.errors import MiniLoraError
from minilora.job import loading
from minilora.job.finetune import Job, fine_tune
from minilora.training.loop import TrainConfig
from minilora.training.processes import joined
from minilora.training.sharding import blocks_of

TRAINING = {"steps": 3, "batch_size": 2, "accumulate": 2, "lr": 0.01, "seed": 5, "eval_every": 2, "save_every": 1}


def kept(model):
    """Bytes of blocks that are here, of all that they have."""
    here = whole = 0
    for block in blocks_of(model):
        for parameter in block.parameters():
            whole += parameter.numel() * parameter.element_size()
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            here += own.numel() * own.element_size()
    return here / whole


def work(fields):
    """The outcome of one job in this process, JSON values."""
    fields, said, found = dict(fields), [], {}
    other = fields.pop("second", {})  # what the second process is told otherwise
    fields |= other if os.environ.get("RANK") == "1" else {}
    lora = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": "all-linear"} | fields.pop("lora", {})
    training = TRAINING | fields.pop("training", {})
    job = Job(**fields, lora=LoraConfig(**lora), training=TrainConfig(**training))
    load = loading.load_model

    def loaded(*given, **options):
        model = load(*given, **options)
        found["kept"] = kept(model)
        return model

    loading.load_model = loaded
    try:
        outcome = fine_tune(job, said.append)
        found |= {"answers": outcome.answers, "losses": outcome.losses}
    except MiniLoraError as error:
        found["error"] = str(error)
    loading.load_model = load
    return found | {"said": said}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with joined():
        line = {name: work(fields) for name, fields in json.loads(sys.argv[2]).items()}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"rank": int(os.environ.get("RANK", "0")), **line}) + "\n")
