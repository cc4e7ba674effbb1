"""Cut a small anchor out of a large model and distil it so that the two can be stitched.

    accelerate launch recipes/shrink.py --large HuggingFaceTB/SmolLM2-135M-Instruct --depth 16 \
        --data tatsu-lab/alpaca book.txt --max_steps 2000 --output_dir runs/smollm2-16

`stitched-llama shrink LARGE OUT --depth 16 --data ... --steps 2000` is the same.

The student starts from one block of each group of neighbours (narrower with `--width`), keeps the teacher's embedding, frozen, at equal
width, and is distilled from the teacher's logits and block outputs; no labels are needed. The output is a plain Transformers folder
whose config.json records what it was cut from, which `--junctions aligned` of the other recipes reads.
"""

import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import set_seed

from stitched_llama.models.loading import load_plain
from stitched_llama.models.references import anchor_config
from stitched_llama.shrinking import (
    ShrinkArguments,
    ShrinkDistillation,
    ShrinkTrainer,
    TokenBlocks,
    check_folder,
    check_lineage,
    cut_model,
    read_documents,
    row_renderer,
    save_shrunk,
)
from stitched_llama.training import (
    check_launch,
    dump_record,
    find_checkpoint,
    load_tokenizer,
    provenance,
    recipe_parser,
    run_settings,
)


@dataclass
class Arguments:
    """The model that is cut, and the data for distillation."""

    large: str = field(metadata={"help": "Folder or Hub id of the model that is cut."})
    data: list[str] = field(
        metadata={"help": "Text files, and chat or instruction data in the formats of the other recipes."}
    )
    depth: int = field(metadata={"help": "Blocks of the small model."})
    width: int | None = field(
        default=None, metadata={"help": "Width of the small model; by default the large model's."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens of one block of text."})
    eval_blocks: int = field(default=32, metadata={"help": "Blocks of text held out."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the large model: float32, bfloat16 or float16."})
    start_from: str | None = field(
        default=None,
        metadata={"help": "A small model that was cut in the same way, to continue from instead of a new cut."},
    )
    resume: str | None = field(default=None, metadata={"help": "auto, or the path of a checkpoint."})


def main() -> None:
    start = time.time()
    usage = "--large LARGE --depth N --data FILE [FILE ...] --output_dir OUT"
    parser = recipe_parser((Arguments, ShrinkArguments), __doc__, usage, epilog="")
    args, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    output = Path(training.output_dir)

    # What can be known to be wrong before hours are spent
    check_launch(training)
    check_folder(output, args.large)
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise SystemExit(f"--dtype {args.dtype} is unknown; one of float32, bfloat16, float16 is needed")
    chosen = {
        name: value for name, value in asdict(args).items() if name not in ("large", "width")
    }  # whose weights are compared
    checkpoint = find_checkpoint(args.resume, training.output_dir, run_settings(training, chosen), bundles=False)

    # Text: documents of all sources in random order, packed into blocks; some are held out
    tokenizer = load_tokenizer(args.large)
    render = row_renderer(tokenizer)
    documents = [document for source in args.data for document in read_documents(source, render)]
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * max(1, training.world_size)
    wanted = args.eval_blocks + rows * training.max_steps if training.max_steps > 0 else None
    vocab_size = anchor_config(args.large).vocab_size
    blocks = TokenBlocks(documents, tokenizer, args.block_size, wanted, training.seed, vocab_size)
    if len(blocks) <= args.eval_blocks:
        raise SystemExit(f"{len(blocks)} blocks of text, {args.eval_blocks} to be held out: give more text")
    held_out = torch.utils.data.Subset(blocks, range(args.eval_blocks))
    train_set = torch.utils.data.Subset(blocks, range(args.eval_blocks, len(blocks)))

    # Teacher, and the student cut out of it
    teacher = load_plain(args.large, dtype=getattr(torch, args.dtype))
    batches = [{"input_ids": blocks.blocks[i : i + 8]} for i in range(0, min(64, args.eval_blocks), 8)]
    cut = cut_model(teacher, args.depth, args.width, batches)
    if args.start_from:
        small = load_plain(args.start_from, dtype=torch.float32).requires_grad_(True)
        check_lineage(small, cut, teacher)
        cut = replace(cut, model=small)
    model = ShrinkDistillation(cut.model.float(), teacher, cut.target_blocks, cut.channels, **training.loss_options())
    trainer = ShrinkTrainer(
        model=model, args=training, train_dataset=train_set, eval_dataset=held_out, processing_class=tokenizer,
        data_settings=chosen | {"text_digest": blocks.digest},
    )  # fmt: skip
    before = trainer.evaluate()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()
    if training.process_index:
        return
    tokens = trained.global_step * rows * args.block_size
    tokenizer.save_pretrained(output)
    save_shrunk(model, output, args.large, tokens=tokens)
    row = provenance() | {
        "large": args.large, "data": args.data, "depth": args.depth, "width": args.width, "steps": trained.global_step,
        "tokens": tokens, "seconds": round(time.time() - start, 1), "parameters": cut.model.num_parameters(),
        "divergence_before": before["eval_divergence"], "divergence": after["eval_divergence"],
        "alignment_before": before["eval_alignment"], "alignment": after["eval_alignment"],
    }  # fmt: skip
    (output / "shrink.json").write_text(dump_record(row))
    print(
        f"divergence of the small model's logits {before['eval_divergence']:.3f} -> {after['eval_divergence']:.3f} nats"
    )
    print(f"{output}: the small anchor; {output / 'shrink.json'}: all figures")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
else:
    raise ImportError("a recipe is run or copied, not imported")
