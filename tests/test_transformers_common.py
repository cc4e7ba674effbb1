"""Transformers' own tests of any model, on a stitched model built from a configuration.

They come in its source distribution alone: `pip download transformers==VERSION --no-binary transformers --no-deps`, unpacked, and
`pip install parameterized`; then `TRANSFORMERS_TESTS=.../tests python -m pytest -m slow tests/test_transformers_common.py` (a minute).
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, python

FROZEN = "nothing trains before attach_pst: the anchors are frozen"
EXPECTED = {  # test that fails -> why
    "test_training": FROZEN,
    "test_training_gradient_checkpointing": FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_false": FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_true": "refused, it loses gradients behind a frozen embedding",
    "test_retain_grad_hidden_states_attentions": FROZEN,
    "test_model_get_set_embeddings": "refused, every anchor has an embedding of its own",
    "test_tied_weights_keys": "what is tied is said by the configuration of each anchor",
    "test_init_weights_can_init_buffers": "anchors come initialised: initialize_weights does nothing",
    "test_model_weights_reload_no_missing_tied_weights": "it edits the weights, which digests.json tells",
    "test_from_pretrained_no_checkpoint": "from_pretrained takes a bundle",
    "test_cannot_load_with_meta_device_context_manager": "refused as well, as a ValueError",
}
STUBS = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}  # left out of it
OURS = """
import unittest
import torch
from transformers import LlamaConfig
from stitched_llama import StitchedLlamaConfig, StitchedLlamaForCausalLM
from .test_modeling_common import ModelTesterMixin, ids_tensor


class Tester:
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 3, 7, 32, 2, 4, 99
    is_training = True

    def get_config(self):
        same = {"vocab_size": 99, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_hidden_layers": 2}
        widths = ({"hidden_size": 16, "intermediate_size": 32}, {"hidden_size": 32, "intermediate_size": 37})
        return StitchedLlamaConfig.from_anchor_configs([LlamaConfig(**same, **own) for own in widths])

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class StitchedTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (StitchedLlamaForCausalLM,)
    all_generative_model_classes = ()  # their mixin is not in the source distribution, and there is no base model inside
    test_resize_embeddings = False  # refused: each anchor is resized, then stitched

    def setUp(self):
        self.model_tester = Tester()
"""


@pytest.mark.slow
@pytest.mark.skipif("TRANSFORMERS_TESTS" not in os.environ, reason="the tests of Transformers are not at hand")
def test_common_tests_pass_but_for_a_list_with_reasons(tmp_path):
    pytest.importorskip("parameterized")
    package = tmp_path / "tests"
    package.mkdir()
    for path in Path(os.environ["TRANSFORMERS_TESTS"]).glob("*.py"):
        shutil.copy(path, package)
    for name, stub in STUBS.items():
        (package / name).parent.mkdir()
        (package / name).with_name("__init__.py").touch()
        (package / name).write_text(f"class {stub}:\n    pass\n")
    (package / "__init__.py").touch()
    (package / "test_ours.py").write_text(OURS)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    how = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "tests/test_ours.py"]
    done = python("-m", "pytest", *how, cwd=tmp_path, check=False, PYTHONPATH=paths)
    failed = set(re.findall(r"^(?:FAILED|SUBFAILED\S*) \S+::(test_\w+)", done.stdout, re.M))
    failed |= set(re.findall(r"^SUBFAILED\[.*?\] \S+::(test_\w+)", done.stdout, re.M))
    assert " passed" in done.stdout, done.stdout[-2000:]
    assert failed == set(EXPECTED), sorted(failed ^ set(EXPECTED))
