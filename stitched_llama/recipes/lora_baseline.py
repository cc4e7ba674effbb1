"""Fine-tune each anchor alone with plain PEFT LoRA (Alpaca-LoRA): the baselines of a stitched run.

    stitched-llama baseline --anchors SMALL LARGE --data train.json ...

That runs this file, `recipes/lora_baseline.py` of a checkout.
Same rows, template and optimiser as `finetune_alpaca.py`, anchors in their stored dtype; `stitched_llama.models` is not used.
`--save` writes the tuned models, LoRA merged, as plain checkpoints; as `--anchors` of that recipe they give adapt-then-stitch.
Writes `{key of the anchor: {"loss", "exact_match", "loss_before", "exact_match_before", "seconds"}}`.
"""

import json
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, set_seed

from stitched_llama import StitchTrainingArguments
from stitched_llama.training import (
    Collator,
    FiniteGradients,
    InstructionDataset,
    TextDataArguments,
    batches,
    check_arguments,
    check_source,
    end_ids,
    evaluate_plain,
    load_tokenizer,
    pad_token_id,
    read_parts,
    recipe_parser,
    template,
)


@dataclass
class Arguments(TextDataArguments):
    """Anchors, data and LoRA of the run."""

    rank: int = field(default=16, metadata={"help": "LoRA rank on q, k, v, o."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the anchors: auto, float32, bfloat16 or float16."})
    save: str | None = field(default=None, metadata={"help": "Folder for the tuned models."})
    rows: str = field(default="baselines.json", metadata={"help": "Path of the result."})


def main() -> None:
    args, training = recipe_parser((Arguments, StitchTrainingArguments), __doc__).parse_args_into_dataclasses()
    check_arguments(training)
    if not args.anchors:
        raise SystemExit("--anchors NAME ... is needed: folders or Hub ids, each is tuned alone")
    for name in args.anchors:
        check_source(name)
    vocab_size = min(AutoConfig.from_pretrained(name, trust_remote_code=False).vocab_size for name in args.anchors)
    tokenizer, found = load_tokenizer(args.anchors[0]), {}
    prompt = template(args.template, tokenizer)
    tokenizer.chat_template = prompt.chat
    rows, held_out = read_parts(args, training.seed)
    train_set = InstructionDataset(rows, tokenizer, prompt, args.max_length, vocab_size=vocab_size)
    collator = Collator(pad_token_id(tokenizer, vocab_size))
    eval_set = InstructionDataset(held_out, tokenizer, prompt, args.max_length, vocab_size=vocab_size)
    held_out_batches = batches(eval_set, collator, training.per_device_eval_batch_size)
    for index, name in enumerate(args.anchors):
        set_seed(training.seed)
        anchor = AutoModelForCausalLM.from_pretrained(
            name, dtype=args.dtype, use_safetensors=True, trust_remote_code=False
        )
        anchor = anchor.to(training.device)
        before = evaluate_plain(anchor, held_out_batches, split=True)
        lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        model = get_peft_model(anchor, lora)
        model.print_trainable_parameters()
        start = time.time()
        quiet = replace(training, save_strategy="no")
        how = {"data_collator": collator, "callbacks": [FiniteGradients()]}
        Trainer(model=model, args=quiet, train_dataset=train_set, **how).train()
        after = evaluate_plain(model, held_out_batches, split=True)
        found[f"{index}[0:{anchor.config.num_hidden_layers}]"] = {
            **after, **{f"{metric}_before": value for metric, value in before.items()}, "seconds": round(time.time() - start, 1),
        }  # fmt: skip
        if args.save:
            tuned = model.merge_and_unload()
            tuned.generation_config.eos_token_id = end_ids(tokenizer, tuned.generation_config, prompt)
            tuned.save_pretrained(Path(args.save) / str(index))
            tokenizer.save_pretrained(Path(args.save) / str(index))
    Path(args.rows).parent.mkdir(parents=True, exist_ok=True)
    Path(args.rows).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
elif __name__ != "__mp_main__":  # a data loader's worker reads its script again
    raise ImportError("a recipe is run or copied, not imported")
