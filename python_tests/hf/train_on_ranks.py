"""Three steps of both trainers, as one process or under torchrun; rank 0 prints losses as JSON."""

import gc
import json
import os
import sys

from hf.tiny import converted, hf, tokens
from torch import distributed
from transformers import Trainer, TrainingArguments


def train(folder):
    """Losses and gates of both trainers."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 40).tolist()]
    results = {}
    for cls in (Trainer, hf.SegmentTrainer):
        model = converted("infini", options={
            "segment_len": 8, "gate_init": 0.3, "first": "gate", "detach_every": 1})  # fmt: skip
        arguments = TrainingArguments(
            output_dir=folder, max_steps=3, per_device_train_batch_size=4 // world,
            learning_rate=3e-3, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
            disable_tqdm=True, lr_scheduler_type="constant", seed=0, weight_decay=0.0,
        )  # fmt: skip
        trainer = cls(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        gates = [layer.self_attn.memory_gate.weight.tolist() for layer in model.model.layers]
        results[cls.__name__] = {"losses": losses, "gates": gates}
    return results


def main(folder):
    results = train(folder)
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    if distributed.is_initialized():
        # Its threads must not outlive the interpreter, and DDP's reducer must not be the last to
        # hold it: that would wait for a thread of gloo's which waits for the GIL.
        gc.collect()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
