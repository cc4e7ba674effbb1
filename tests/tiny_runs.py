"""One small training run, for tests in this process and, as a script under torchrun, on several ranks."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import fresh, randomise

from stitched_llama import PSTConfig, StitchImageTrainer, StitchTrainer, StitchTrainingArguments
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    Row,
    batches,
    byte_tokenizer,
    collate_images,
    evaluate_stitches,
    find_checkpoint,
    template,
)

WORDS = ("alpaca", "wool", "hill", "grass", "river", "stone", "cloud", "path")
ROWS = [Row(f"say {a}", "", f"{a} {b}"[: 4 + i % 7]) for i, a in enumerate(WORDS) for b in WORDS[:4]]


DEFAULTS = {
    "max_steps": 4, "per_device_train_batch_size": 8, "global_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    "seed": 20, "interval_count": 3, "warmup_steps": 0, "anchor_share": 0.34,
}  # four steps of that seed: a stitch, an anchor, two stitches  # fmt: skip


def dataset(rows=ROWS):
    tokenizer = byte_tokenizer()
    return InstructionDataset(rows, tokenizer, template("short", tokenizer), max_length=48)


def stitched_model(folders, seed=0, **how):
    return fresh(folders, PSTConfig(rank=4, stitching_rank=3), seed=seed, **how)


def trainer(model, output, callbacks=None, data_settings=None, **options):
    """A trainer of four steps on eight rows each, with what each step has `drawn`; PST is as the model has it."""
    arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(output), **options})
    data = dataset()
    made = StitchTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=dataset(ROWS[:5]), data_collator=Collator(0),
        callbacks=callbacks, data_settings=data_settings,
    )  # fmt: skip
    made.drawn, draw = {}, made.draw
    made.draw = lambda step: made.drawn.setdefault(step, draw(step))
    return made


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def evaluated(model, **ranks):
    return evaluate_stitches(model, batches(dataset(ROWS[:5]), Collator(0), 2), progress=False, **ranks)


def image_model(options):
    """Two Swins joined across their stages by bottlenecks with norms, and PST."""
    from image_anchors import FAMILIES, build

    model = FAMILIES["swin"][0].from_anchors(build("swin"), **options)
    model.attach_pst(PSTConfig(rank=2))
    return model


def main(output, folders, options):
    """Trains and evaluates on all ranks; each writes what it drew, what it found and what it holds.

    `folders` of text anchors, or the options of `image_model`.
    """
    if isinstance(folders, dict):
        model = randomise(image_model(folders))
        run = image_trainer(model, output, **options)
        data = collate_images([run.train_dataset[i] for i in range(16)])
    else:
        model = randomise(stitched_model(folders))
        run = trainer(model, output, **options)
    run.train()
    ranks = {"rank": run.args.process_index, "world_size": run.args.world_size}
    if isinstance(folders, dict):
        found = evaluate_stitches(model, [data], progress=False, **ranks)
    else:
        found = evaluated(model, **ranks)
    state = {
        "weights": trained(model),
        "statistics": {n: t for n, t in model.stitching_layers.named_buffers() if t.is_floating_point()},
        "found": found,
        "averages": run.importance.averages,
        "world": run.args.world_size,
    }
    if not isinstance(folders, dict) and not options.get("activation_checkpointing"):
        state["stops"] = stops(folders, Path(output) / "stops", options)
    torch.save(state | {"visits": run.importance.visits}, Path(output) / f"rank{run.args.process_index}.pt")


def stops(folders, output, options):
    """Told of by rank 1 alone: SIGTERM in the second step, and after a resume a loss that is no number in the third."""
    told = []
    for fault in ("sigterm", "nan", None):
        run = trainer(randomise(stitched_model(folders)), output, **options)
        logits, rank = run._response_logits, run.args.process_index

        def faulty(model, inputs, labels, stitch=None, fault=fault, run=run, logits=logits, rank=rank):
            found, wanted = logits(model, inputs, labels, stitch)
            if rank == 1 and fault == "sigterm" and run.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            spoilt = rank == 1 and fault == "nan" and run.state.global_step == 2
            return found * (torch.nan if spoilt else 1), wanted

        run._response_logits = faulty
        try:
            run.train(resume_from_checkpoint=fault != "sigterm")
        except (SystemExit, ValueError) as error:
            told.append(str(error))
    return told, find_checkpoint("auto", str(output)), trained(run.model)


class Pictures(torch.utils.data.Dataset):
    """Sixteen pictures of noise with a label each, one batch of tensors a row."""

    def __init__(self, side):
        self.pixels = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": index % 7}


def image_trainer(model, output, teacher=None, **options):
    arguments = StitchTrainingArguments(**{**DEFAULTS, "output_dir": str(output), **options})
    data = Pictures(model.config.image_size)
    return StitchImageTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate_images, teacher=teacher
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
