"""Whole runs, each a script that reads top to bottom: the commands `stitched-llama finetune`, `finetune-vision`, `baseline`, ...

finetune_alpaca   one fine-tune of every size between LLaMA anchors
finetune_vision   the same for image classifiers
shrink            a small anchor out of a large model
lora_baseline     each anchor tuned alone by plain PEFT LoRA, to set beside it, or to stitch
vision_baseline   the same for image classifiers, or tuned whole

A recipe is run or copied, not imported; `recipes/` of a checkout is this folder.
"""
