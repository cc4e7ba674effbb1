"""Whatever a fresh interpreter imports first, before us or after: it imports, and the Auto classes know us."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from conftest import python

from stitched_llama._register import CONFIGS

FIRST = [
    "from transformers import pipeline",
    "from transformers import Trainer",
    "from transformers import LlamaForCausalLM",
    "from transformers import PreTrainedModel",
    "from transformers import AutoModelForCausalLM",
    "from transformers import AutoConfig",
    "from transformers import GenerationConfig",
    "import peft",
    "import accelerate",
    "import datasets",
]
OTHERS = [
    "import transformers",
    "import transformers.models.auto.modeling_auto",
    "from transformers import AutoTokenizer, AutoModelForImageClassification",
    "from transformers import AutoImageProcessor",
    "from transformers import AutoProcessor",
    "from transformers import TrainingArguments, set_seed",
    "from transformers import HfArgumentParser",
    "from transformers import BitsAndBytesConfig",
    "from transformers import TextIteratorStreamer",
    "from transformers import DynamicCache",
    "from transformers import PreTrainedTokenizerFast",
    "from transformers import ViTForImageClassification",
    "from transformers import LlamaConfig",
    "from transformers.modeling_utils import PreTrainedModel",
    "from transformers.quantizers import AutoHfQuantizer",
    "from peft import LoraConfig, AutoPeftModelForCausalLM",
    "from accelerate import Accelerator",
    "import bitsandbytes",
    "import safetensors.torch",
    "import torch",
]
OTHERS += ["from trl import SFTTrainer"] if find_spec("trl") else []
NAMED = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print('stitched_llama' in CONFIG_MAPPING, 'stitched_llama.models' in __import__('sys').modules)
"""
KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
config = AutoConfig.for_model('stitched_llama')
image = AutoConfig.for_model('stitched_mobilenet_v2')
print(AutoModelForCausalLM._model_mapping[type(config)].__name__,
      AutoModelForImageClassification._model_mapping[type(image)].__name__)
"""


def check(starts, end=KNOWN, wanted=("StitchedLlamaForCausalLM", "StitchedMobileNetV2ForImageClassification")):
    """Each in an interpreter of its own, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda start: python("-c", start + end, check=False), starts))
    for start, done in zip(starts, told):
        assert done.returncode == 0, f"{start}\n{done.stderr[-2000:]}"
        assert done.stdout.split() == list(wanted), start


def test_we_come_first():
    """That the classes are found afterwards is for two below and the slow ones."""
    check([f"import stitched_llama\n{line}" for line in FIRST], NAMED, ("True", "False"))


def test_we_come_last():
    all_of_them = "\n".join([*FIRST, "import stitched_llama"])
    check([all_of_them], NAMED, ("True", "False"))
    check([all_of_them])


@pytest.mark.slow
def test_we_come_first_or_last_with_anything_else():
    check([f"import stitched_llama\n{line}" for line in FIRST + OTHERS])
    check([f"{line}\nimport stitched_llama" for line in FIRST + OTHERS])


def test_a_pipeline_loads_a_bundle(bundle):
    """What the README's reader does first."""
    code = (
        "import stitched_llama\nfrom transformers import pipeline\n"
        f"print(type(pipeline('text-generation', model={str(bundle)!r}, tokenizer={{!r}}).model).__name__)"
    )
    anchor = json.loads((bundle / "config.json").read_text())["anchors"][0]["name_or_path"]
    assert python("-c", code.format(anchor)).stdout.split()[-1] == "StitchedLlamaForCausalLM"


def test_names_are_those_of_the_classes():
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from stitched_llama.models import CLASSES

    assert CONFIGS == {kind: model_class.config_class.__name__ for kind, model_class in CLASSES.items()}
    assert all(CONFIG_MAPPING[kind] is model_class.config_class for kind, model_class in CLASSES.items())
    with pytest.raises(
        ValueError, match="Model type should be one of .*StitchedViTConfig"
    ):  # imports every class there is
        AutoModelForImageClassification.from_config(CLASSES["stitched_llama"].config_class())
