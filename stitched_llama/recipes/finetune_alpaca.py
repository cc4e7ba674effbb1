"""Fine-tune every size between two or more LLaMA anchors on an instruction set, in one run (ESTA section 5.2).

    accelerate launch -m stitched_llama finetune --anchors huggyllama/llama-7b huggyllama/llama-13b

That runs this file, `recipes/finetune_alpaca.py` of a checkout. Both anchors stay in memory: about 20 GB in 8 bits for 7B/13B, 24 to
32 GB with activations, and 10 GB more during calibration; not measured at that size. `--smoke` runs everything on pico anchors.
"""

import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, set_seed

from stitched_llama import (
    Budget,
    StitchedLlamaForCausalLM,
    StitchSpace,
    StitchTable,
    StitchTrainer,
    StitchTrainingArguments,
)
from stitched_llama.space import palette_gains
from stitched_llama.training import (
    Collator,
    InstructionDataset,
    PSTArguments,
    SpaceArguments,
    TextDataArguments,
    batches,
    check_arguments,
    dump_record,
    end_ids,
    evaluate_stitches,
    find_checkpoint,
    format_gains,
    format_table,
    is_published,
    load_tokenizer,
    measured_options,
    pad_token_id,
    plot_stitches,
    provenance,
    read_baselines,
    read_parts,
    recipe_parser,
    run_settings,
    sample_budgets,
    smoke_anchors,
    spearman,
    template,
)


@dataclass
class Arguments(TextDataArguments):
    """Anchors, data and initialisation of the run."""

    train_on_prompt: bool = field(default=False, metadata={"help": "Train on the prompt too."})
    load_in_8bit: bool = field(default=True, metadata={"help": "Anchors in 8 bits, as in the paper."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Anchors in 4 bits (NF4) instead."})
    dtype: str = field(default="auto", metadata={"help": "Of the anchors; auto: of --bf16/--fp16, else as stored."})
    calibration_size: int = field(default=512, metadata={"help": "Rows for the least-squares initialisation."})
    align_steps: int = field(default=0, metadata={"help": "Alignment steps after it, for independent anchors."})
    ridge: float = field(default=1e-4, metadata={"help": "Relative ridge of least squares."})
    resume: str | None = field(default=None, metadata={"help": "auto (newest complete checkpoint), or a path."})
    baselines: str | None = field(default=None, metadata={"help": "JSON file of the baseline recipe, for comparison."})
    band: int = field(default=2, metadata={"help": "Blocks around the nearest depth for --junctions similar."})
    budgets: list[str] = field(default_factory=list, metadata={"help": "Budgets of the sample answers."})
    evaluate_before: bool = field(default=True, metadata={"help": "Also evaluate every stitch before the fine-tune."})
    smoke: bool = field(default=False, metadata={"help": "A whole run on pico anchors in under a minute."})


def main() -> None:
    start = time.time()
    parser = recipe_parser((Arguments, SpaceArguments, PSTArguments, StitchTrainingArguments), __doc__)
    args, options, pst, training = parser.parse_args_into_dataclasses()
    output = Path(training.output_dir)
    if args.smoke:
        args, training = smoke_anchors(args, training)
    if len(args.anchors) < 2:
        raise SystemExit("--anchors SMALL LARGE is needed: two or more folders or Hub ids (or --smoke)")
    set_seed(training.seed)
    chief = training.process_index == 0

    # Checks before hours are spent
    check_arguments(training)
    if args.load_in_4bit and training.device.type == "cpu":
        raise SystemExit("--load_in_4bit needs a GPU to train (bitsandbytes): use --load_in_8bit or neither here")
    if pst.full and (args.load_in_8bit or args.load_in_4bit):
        raise SystemExit("--full trains the anchors' own weights, which 8 or 4 bits cannot: add --no_load_in_8bit")
    settings = run_settings(training, args, options, pst)
    checkpoint = find_checkpoint(args.resume, training.output_dir, settings)
    if is_published(checkpoint, output, args.anchors):
        return
    shape = options.options()
    space = StitchSpace.from_configs(args.anchors, **shape)
    pst.settings().trainable_params(space)
    baselines = read_baselines(args.baselines, space)
    for budget in map(Budget.parse, args.budgets):
        if budget.kind != "memory_bytes":  # bytes depend on the dtype the anchors are loaded in
            StitchTable().choose(space, budget)

    # Data: rows, a held-out part, the published template, labels on the response
    tokenizer = load_tokenizer(args.anchors[0])
    prompt = template(args.template, tokenizer)
    tokenizer.chat_template = prompt.chat
    vocab_size = min(anchor.contract["vocab_size"] for anchor in space.anchors)
    rows, held_out = read_parts(args, training.seed)
    train_set = InstructionDataset(rows, tokenizer, prompt, args.max_length, args.train_on_prompt, vocab_size)
    eval_set = InstructionDataset(held_out, tokenizer, prompt, args.max_length, vocab_size=vocab_size)
    collator = Collator(pad_token_id(tokenizer, vocab_size))
    size = training.per_device_eval_batch_size
    held_out_batches = batches(eval_set, collator, size)
    calibration_batches = partial(batches, train_set, collator, size, limit=args.calibration_size)

    # Model: frozen anchors, stitching layers by least squares, then the trainable parts
    quantization = None
    if args.load_in_4bit:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    elif args.load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    shape |= measured_options(options, args.anchors, calibration_batches(), args.band, training.autocast_dtype, chief)
    mixed = "bfloat16" if training.bf16 else "float16" if training.fp16 else "auto"  # both at once give float32
    model = StitchedLlamaForCausalLM.from_anchors(
        args.anchors, **shape, dtype=mixed if args.dtype == "auto" else args.dtype,
        quantization_config=quantization,
        device_map={"": training.device.index or 0} if training.device.type == "cuda" else None,
    )  # fmt: skip
    model.to(training.device)
    model.generation_config.eos_token_id = end_ids(tokenizer, model.generation_config, prompt)
    calibration = None
    if len(model.stitching_layers):
        how = {"ridge": args.ridge, "align_steps": args.align_steps, "progress": chief}
        calibration = model.calibrate(calibration_batches(), **how)
    if chief:
        print(calibration or "identity junctions: nothing to calibrate")
    model.attach_pst(pst.settings())
    if chief:
        print(f"{len(train_set)} rows, {len(eval_set)} held out, template {prompt.name}, {len(model.space)} stitches")
        model.print_trainable_parameters()

    # Every stitch before, the fine-tune, every stitch after
    evaluate = partial(
        evaluate_stitches, model, held_out_batches, progress=chief, split=True, autocast=training.autocast_dtype,
        rank=training.process_index, world_size=training.world_size,
    )  # fmt: skip
    for name, values in evaluate().items() if args.evaluate_before else ():
        model.table = model.table.with_metrics(f"{name}_before", values)
    trainer = StitchTrainer(
        model=model, args=training, train_dataset=train_set, eval_dataset=eval_set, data_collator=collator,
        processing_class=tokenizer, data_settings=settings,
    )  # fmt: skip
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    after = evaluate()
    for name, values in after.items():
        model.table = model.table.with_metrics(name, values, decides=name == "loss")
    if not chief:
        return

    # Results: bundle, table, plot, samples, one JSON row
    model.table = replace(model.table, alone=baselines)
    trainer.save_importance()
    bundle = output / "bundle"
    model.save_pretrained(bundle)
    tokenizer.save_pretrained(bundle)
    title = f"{' and '.join(Path(a).name for a in args.anchors)}: every stitch, {trained.global_step} steps"
    plot_stitches(model.space, model.table, output / "stitches.png", title=title)
    text = format_table(model.space, model.table)
    (output / "table.txt").write_text(text + "\n")
    order = partial(spearman, [stitch.params for stitch in model.space])
    orders = {name: order([values[stitch.key] for stitch in model.space]) for name, values in after.items()}
    gains = palette_gains(model.space, model.table)
    correlations = ", ".join(f"{name}: {value:.2f}" for name, value in orders.items())
    print(f"{text}\n{format_gains(gains)}\nSpearman of parameters and {correlations}")
    row = provenance() | {
        "anchors": args.anchors, "data": args.data, "train_rows": len(train_set), "held_out_rows": len(eval_set),
        "steps": trained.global_step, "train_seconds": round(trained.metrics["train_runtime"], 1),
        "seconds": round(time.time() - start, 1), "seed": training.seed, "trainable": model.trainable_parameters(),
        "calibration": calibration and asdict(calibration), "spearman": orders, "baselines": baselines, "palette_gain": gains,
        "table": model.table.to_dict(model.space),
    }  # fmt: skip
    (output / "result.json").write_text(dump_record(row | {"samples": None}))
    samples = sample_budgets(model, tokenizer, prompt, eval_set.rows[:3], args.budgets, max_new_tokens=48)
    (output / "result.json").write_text(dump_record(row | {"samples": samples}))
    for sample in samples:
        print(f"\n{sample['prompt']!r}", *(f"  {size}: {a!r}" for size, a in sample["answers"].items()), sep="\n")
    print(f"{bundle}: the bundle; {output / 'stitches.png'}: the plot; {output / 'result.json'}: all figures")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
elif __name__ != "__mp_main__":  # a data loader's worker reads its script again
    raise ImportError("a recipe is run or copied, not imported")
