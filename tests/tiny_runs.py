"""One small training run, for tests in this process and, as a script under torchrun, on several ranks."""

import json
import sys
from pathlib import Path

from conftest import fresh, randomise

from stitched_llama import PSTConfig, StitchTrainer, StitchTrainingArguments
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    Row,
    batches,
    byte_tokenizer,
    evaluate_stitches,
    template,
)

WORDS = ("alpaca", "wool", "hill", "grass", "river", "stone", "cloud", "path")
ROWS = [Row(f"say {a}", "", f"{a} {b}"[: 4 + i % 7]) for i, a in enumerate(WORDS) for b in WORDS[:4]]


def dataset(rows=ROWS):
    return InstructionDataset(rows, byte_tokenizer(), template("short"), max_length=48)


def stitched_model(folders, seed=0, **how):
    return fresh(folders, PSTConfig(rank=4, stitching_rank=3), seed=seed, **how)


def trainer(model, output, callbacks=None, **options):
    """A trainer of four steps on eight rows each; PST is as the model has it."""
    defaults = {
        "output_dir": str(output), "max_steps": 4, "per_device_train_batch_size": 8, "global_batch_size": 8,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3, "interval_count": 3, "warmup_steps": 0,
    }  # fmt: skip
    arguments = StitchTrainingArguments(**{**defaults, **options})
    data = dataset()
    return StitchTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=dataset(ROWS[:5]), data_collator=Collator(0),
        callbacks=callbacks,
    )  # fmt: skip


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def evaluated(model, **ranks):
    return evaluate_stitches(model, batches(dataset(ROWS[:5]), Collator(0), 2), progress=False, **ranks)


def main(output, folders, options):
    """Trains and evaluates on all ranks; each writes what it drew, what it found and what it holds."""
    import torch

    model = randomise(stitched_model(folders))
    run = trainer(model, output, **options)
    run.train()
    found = evaluated(model, rank=run.args.process_index, world_size=run.args.world_size)
    state = {
        "weights": trained(model),
        "found": found,
        "averages": run.importance.averages,
        "world": run.args.world_size,
    }
    torch.save(state | {"visits": run.importance.visits}, Path(output) / f"rank{run.args.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
