"""Fine-tune every size between two or more image classifiers on a new task, in one run (ESTA section 5.1, appendix A).

    accelerate launch -m stitched_llama finetune-vision --data cifar100 --rank 32 16 8 \\
        --anchors WinKawaks/vit-tiny-patch16-224 WinKawaks/vit-small-patch16-224 google/vit-base-patch16-224

That runs this file, `recipes/finetune_vision.py` of a checkout, which `accelerate launch` takes as well.

Defaults are ESTA's settings: AdamW, cosine, 10 % warm-up, rate `base_lr * batch / 256`, 15 intervals, kernel 2, stride 1, except for
its ranks 32 16 8 (the default is rank 16 for all anchors) and its training step and sampling:
`--train_teacher --sampling esta --importance snip`. SN-Net's procedure is the same recipe with other settings:
`--full --sampling uniform --no_inplace_teacher`, `--teacher NAME` for an external teacher, `--anchor_lr_scale 0.1` for staged
families, `--shared mean`; for adapt-then-stitch, `--anchors` names the output of `stitched-llama baseline-vision --full --save FOLDER`.
`--adapter bottleneck --rescale bilinear --across_stages` joins stages of different resolution (Traft and Cheney).
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, set_seed

import stitched_llama as sl
from stitched_llama.models import image_class
from stitched_llama.models.references import anchor_config
from stitched_llama.space import ImageSpaceArguments, palette_gains
from stitched_llama.training import (
    ImageDataArguments,
    ImageSet,
    ImageTrainingArguments,
    PSTArguments,
    batches,
    check_arguments,
    check_source,
    collate_images,
    dump_record,
    evaluate_stitches,
    few_shot,
    find_checkpoint,
    format_gains,
    format_table,
    is_published,
    load_processor,
    plot_stitches,
    provenance,
    read_baselines,
    read_images,
    recipe_parser,
    run_settings,
    some_of,
    spearman,
)


@dataclass
class Arguments(ImageDataArguments):
    """Anchors, data and initialisation of the run."""

    teacher: str | None = field(default=None, metadata={"help": "External teacher, with the same classes."})
    init: str = field(
        default="least_squares", metadata={"help": "Of the stitching layers: least_squares, kaiming or identity."}
    )
    shared: str = field(default="joint", metadata={"help": "Least squares of a shared layer: joint or mean (SN-Net)."})
    calibration_size: int = field(default=100, metadata={"help": "Images for least squares (SN-Net 4)."})
    ridge: float = field(default=1e-4, metadata={"help": "Relative ridge of least squares."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the anchors: auto, float32, bfloat16 or float16."})
    resume: str | None = field(default=None, metadata={"help": "auto (newest complete checkpoint), or a path."})
    baselines: str | None = field(default=None, metadata={"help": "JSON file of the baseline recipe, for the plot."})


def main() -> None:
    start = time.time()
    parser = recipe_parser((Arguments, ImageSpaceArguments, PSTArguments, ImageTrainingArguments), __doc__)
    args, space, pst, training = parser.parse_args_into_dataclasses()
    output = Path(training.output_dir)
    if args.init not in ("least_squares", "kaiming", "identity"):
        raise SystemExit(f"--init {args.init} is unknown; one of least_squares, kaiming, identity is needed")
    check_arguments(training)
    set_seed(training.seed)
    chief = training.process_index == 0
    settings = run_settings(training, args, space, pst)
    checkpoint = find_checkpoint(args.resume, training.output_dir, settings)
    if is_published(checkpoint, output, args.anchors):
        return

    # Data: images, few-shot on request, preprocessed by the processor of the largest anchor
    images = read_images(args.data, args.train_split)
    held_out = some_of(read_images(args.data, args.eval_split, images.names), args.eval_size, training.seed)
    if args.shots:
        images = few_shot(images, args.shots, training.seed)
    classes = dict(enumerate(images.names))

    # Checks before hours are spent
    configs = [anchor_config(name, id2label=classes) for name in args.anchors]
    model_class = image_class(config.model_type for config in configs)
    shape = model_class.config_class.from_anchor_configs(configs, **space.options()).stitch_space()
    pst.settings().trainable_params(shape)
    baselines = read_baselines(args.baselines, shape)

    processor, channels = load_processor(args.anchors[-1]), shape.anchors[-1].contract["num_channels"]
    train_set = ImageSet(images, processor, args.augment, training.seed, channels=channels)
    eval_set = ImageSet(held_out, processor, channels=channels)
    held_out_batches = batches(eval_set, collate_images, training.per_device_eval_batch_size)

    # Model: frozen anchors with new heads, stitching layers by least squares, then the trainable parts
    model = model_class.from_anchors(args.anchors, **space.options(), dtype=args.dtype, id2label=classes)
    model.to(training.device)
    calibration = None
    if args.init == "least_squares":
        samples = _calibration_batches(train_set, args.calibration_size)
        calibration = model.calibrate(samples, ridge=args.ridge, shared=args.shared, progress=chief)
    else:
        for layer in model.stitching_layers.values():
            layer.init_kaiming() if args.init == "kaiming" else layer.init_identity()
    model.attach_pst(pst.settings())
    if chief:
        print(calibration or f"stitching layers: {args.init}")
        print(f"{len(train_set)} images to train on, {len(eval_set)} held out, {len(model.space)} stitches")
        model.print_trainable_parameters()

    # The fine-tune, every stitch after
    teacher = None
    if args.teacher is not None:
        check_source(args.teacher)
        teacher = AutoModelForImageClassification.from_pretrained(
            args.teacher, use_safetensors=True, trust_remote_code=False
        )
    trainer = sl.StitchImageTrainer(
        model=model, args=training, train_dataset=train_set, eval_dataset=eval_set, data_collator=collate_images,
        teacher=teacher, data_settings=settings,
    )  # fmt: skip
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    ranks = {"rank": training.process_index, "world_size": training.world_size}
    after = evaluate_stitches(model, held_out_batches, progress=chief, split=True, **ranks)
    for name, values in after.items():
        model.table = model.table.with_metrics(name, values, decides=name == "accuracy")
    if not chief:
        return

    # Results: bundle, table, plot, one JSON row
    model.table = replace(model.table, alone=baselines)
    trainer.save_importance()
    model.save_pretrained(output / "bundle")
    processor.save_pretrained(output / "bundle")
    title = f"{', '.join(Path(a).name for a in args.anchors)} on {Path(args.data).stem}: {trained.global_step} steps"
    plot_stitches(model.space, model.table, output / "stitches.png", title=title)
    text = format_table(model.space, model.table)
    (output / "table.txt").write_text(text + "\n")
    orders = {
        name: spearman([s.params for s in model.space], [v[s.key] for s in model.space]) for name, v in after.items()
    }
    gains = palette_gains(model.space, model.table)
    print(
        f"{text}\n{format_gains(gains)}\nSpearman of parameters and "
        + ", ".join(f"{name}: {value:.2f}" for name, value in orders.items())
    )
    row = provenance() | {
        "anchors": args.anchors, "data": args.data, "classes": len(images.names), "shots": args.shots,
        "train_images": len(train_set), "held_out_images": len(eval_set), "steps": trained.global_step,
        "train_seconds": round(trained.metrics["train_runtime"], 1), "seconds": round(time.time() - start, 1),
        "seed": training.seed, "trainable": model.trainable_parameters(), "calibration": calibration and asdict(calibration),
        "spearman": orders, "baselines": baselines, "palette_gain": gains, "table": model.table.to_dict(model.space),
    }  # fmt: skip
    (output / "result.json").write_text(dump_record(row))
    print(
        f"{output / 'bundle'}: the bundle; {output / 'stitches.png'}: the plot; {output / 'result.json'}: all figures"
    )


def _calibration_batches(images: ImageSet, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without augmentation, and without labels, as the new heads are untrained."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for first in range(0, len(order), 10):
        yield {"pixel_values": torch.stack([images.pixel_values(index) for index in order[first : first + 10]])}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
elif __name__ != "__mp_main__":  # a data loader's worker reads its script again
    raise ImportError("a recipe is run or copied, not imported")
