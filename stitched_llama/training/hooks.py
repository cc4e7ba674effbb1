"""Private members of Transformers that this package depends on, by the class that defines them.

They may change in any release: `tests/test_host_hooks.py` compares this list with the installed version, so that an upgrade fails
there first, by name.
"""

# Methods that our subclasses override
OVERRIDDEN = {
    "transformers.Trainer": (
        "_get_learning_rate",
        "_inner_training_loop",
        "_load_best_model",
        "_load_from_checkpoint",
        "_save_checkpoint",
    ),
    "transformers.GenerationMixin": (
        "_get_candidate_generator",
        "_get_logits_processor",
        "_get_static_cache_init_shape",
        "_prepare_cache_for_generation",
    ),
    "transformers.PreTrainedConfig": ("_remove_keys_not_serialized",),
}
# Class attributes that our subclasses set
DECLARED = {
    "transformers.PreTrainedModel": (
        "_can_compile_fullgraph",
        "_can_record_outputs",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
    ),
}
# Members that we call or set and do not override
USED = {
    "transformers.Trainer": ("_get_collator_with_removed_columns", "_get_output_dir", "_prepare_inputs"),
    "transformers.PreTrainedModel": ("_keys_to_ignore_on_save",),
    "transformers.PreTrainedConfig": ("_attn_implementation",),
}
# Attributes of a model that a module of Transformers reads by name; `_output_capturing_hooks_installed` is a property of ours
READ_BY_NAME = {"transformers.utils.output_capturing": ("_output_capturing_hooks_installed",)}
