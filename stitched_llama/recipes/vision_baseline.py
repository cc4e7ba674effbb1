"""Fine-tune each image classifier alone, with plain PEFT LoRA or all weights: the baselines of a stitched run.

    stitched-llama baseline-vision --anchors TINY SMALL BASE --data cifar100 --rank 32 16 8 --rows baselines.json
    stitched-llama baseline-vision --anchors TINY SMALL BASE --data cifar100 --full --save runs/adapted

That runs this file, `recipes/vision_baseline.py` of a checkout.
Same images, augmentation, optimiser and steps as `finetune_vision.py`; `stitched_llama.models` is not used. `--save` writes the
tuned models as plain checkpoints; as `--anchors` of that recipe they give adapt-then-stitch, SN-Net's first stage.
Writes `{key of the anchor: {"loss", "accuracy", "seconds"}}`.
"""

import json
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, set_seed

from stitched_llama.pst import show_convolutions
from stitched_llama.space import anchor_spec
from stitched_llama.training import (
    EpochOfAugmentation,
    FiniteGradients,
    ImageDataArguments,
    ImageSet,
    ImageTrainingArguments,
    batches,
    check_arguments,
    check_source,
    collate_images,
    evaluate_plain,
    few_shot,
    load_processor,
    read_images,
    recipe_parser,
    some_of,
)


@dataclass
class Arguments(ImageDataArguments):
    """Anchors, data and LoRA of the run."""

    rank: list[int] = field(
        default_factory=lambda: [16], metadata={"help": "LoRA rank: one for all anchors, or one for each."}
    )
    full: bool = field(default=False, metadata={"help": "Train all weights instead of LoRA and the head."})
    save: str | None = field(default=None, metadata={"help": "Folder for the tuned models."})
    rows: str = field(default="baselines.json", metadata={"help": "Path of the result."})


def main() -> None:
    args, training = recipe_parser((Arguments, ImageTrainingArguments), __doc__).parse_args_into_dataclasses()
    check_arguments(training)
    ranks = args.rank * len(args.anchors) if len(args.rank) == 1 else args.rank
    if len(ranks) != len(args.anchors):
        raise SystemExit(f"{len(ranks)} ranks for {len(args.anchors)} anchors: give one --rank, or one for each anchor")
    for name in args.anchors:
        check_source(name)
    processors = [load_processor(name) for name in args.anchors]  # each anchor gets images from its own processor
    images = read_images(args.data, args.train_split)
    held_out = some_of(read_images(args.data, args.eval_split, images.names), args.eval_size, training.seed)
    if args.shots:
        images = few_shot(images, args.shots, training.seed)
    found = {}
    for index, (name, rank) in enumerate(zip(args.anchors, ranks)):
        set_seed(training.seed)
        labels = {"id2label": dict(enumerate(images.names)), "label2id": {n: i for i, n in enumerate(images.names)}}
        how = {"ignore_mismatched_sizes": True, "use_safetensors": True, "trust_remote_code": False, **labels}
        model = AutoModelForImageClassification.from_pretrained(name, **how)
        spec = anchor_spec(model.config.to_dict())
        channels, processor = spec.contract["num_channels"], processors[index]
        train_set = ImageSet(images, processor, args.augment, training.seed, channels=channels)
        eval_set = ImageSet(held_out, processor, channels=channels)
        held_out_batches = batches(eval_set, collate_images, training.per_device_eval_batch_size)
        if not args.full:
            targets = sorted({layer for block in spec.blocks for layer, *_ in block.adapted})
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["classifier"])
            model = get_peft_model(model, lora)
            show_convolutions(model)
            model.print_trainable_parameters()
        start = time.time()
        quiet = replace(training, save_strategy="no", label_names=["labels"])
        callbacks = [EpochOfAugmentation(), FiniteGradients()]
        Trainer(
            model=model, args=quiet, train_dataset=train_set, data_collator=collate_images, callbacks=callbacks
        ).train()
        scores = evaluate_plain(model, held_out_batches, split=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[f"{index}[0:{spec.depth}]"] = {
            **scores, "trained": trained, "seconds": round(time.time() - start, 1),
        }  # fmt: skip
        if args.save:
            plain = model if args.full else model.merge_and_unload()
            plain.save_pretrained(Path(args.save) / str(index))
            processor.save_pretrained(Path(args.save) / str(index))
        Path(args.rows).parent.mkdir(parents=True, exist_ok=True)
        Path(args.rows).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
elif __name__ != "__mp_main__":  # a data loader's worker reads its script again
    raise ImportError("a recipe is run or copied, not imported")
