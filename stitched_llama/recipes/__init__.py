"""Complete runs, each a script that reads top to bottom: the commands `stitched-llama finetune`, `finetune-vision`, `baseline`, ...

finetune_alpaca   one fine-tune of every size between LLaMA anchors
finetune_vision   the same for image classifiers
shrink            a small anchor cut out of a large model and distilled
lora_baseline     each anchor fine-tuned alone by plain PEFT LoRA, as a baseline or to be stitched
vision_baseline   the same for image classifiers, with LoRA or all weights

A recipe is run or copied, not imported; `recipes/` of a checkout is this folder.
"""
