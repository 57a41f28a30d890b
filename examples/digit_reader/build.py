"""The parts of the digit reader before training: tokenizer, processor and untrained model.

It is an Idefics3 (the architecture of SmolVLM) made very small. Nothing here is a new architecture, so
transformers and vLLM load the result without a line of extra code.
"""

from pathlib import Path

import torch
from data import CELL_SIZE_PX, QUESTIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

END_OF_TURN = "<end_of_utterance>"

CHAT_TEMPLATE = (
    "{% for m in messages %}{{m['role'].capitalize()}}:"
    "{% if m['content'] is string %} {{m['content']}}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image>{% else %} {{c['text']}}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""SmolVLM's template, shortened: `User:<image> question<end_of_utterance>`, a newline, `Assistant:`."""

MAX_GRID_SIDE = 4
PATCH_SIZE_PX = 16
NUM_TOKENS_PER_TILE = 4

_NAMED_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    END_OF_TURN,
)
# As SmolVLM's tokenizer has them; this processor cuts at most 4 x 4 tiles.
_TILE_TOKENS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
# Words of questions the shipped model was never taught, kept so that its vocabulary can be rebuilt.
_UNTAUGHT_QUESTIONS = ("What is the sum of the digits?", "What is the sum of all digits?")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the questions and the numbers: 544 tokens, always the same."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[*_NAMED_TOKENS, *_TILE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=END_OF_TURN,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[*_NAMED_TOKENS[4:], *_TILE_TOKENS],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokenizer_corpus() -> list[str]:
    # The repetitions are weights: BPE merges what it meets most often first.
    words = "User: Assistant: yes no none . " + " ".join(str(digit) for digit in range(10))
    numbers = " " + " ".join(str(number) for number in range(145))
    phrasings = [phrasing for group in QUESTIONS.values() for phrasing in group]
    questions = [phrasing.format(row=1, column=2, digit=3) for phrasing in phrasings]
    questions += _UNTAUGHT_QUESTIONS
    return [words] * 5 + [numbers] * 3 + [f"User: Assistant: {question}" for question in questions] * 9


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """Make the processor: scale the longer side to 256 px, cut 64 px tiles, add an overview tile."""
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": MAX_GRID_SIDE * CELL_SIZE_PX},
        max_image_size={"longest_edge": CELL_SIZE_PX},
        do_image_splitting=True,
    )
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=NUM_TOKENS_PER_TILE, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Idefics3ForConditionalGeneration:
    """Make the untrained model: 1,688,576 parameters in float32.

    Args:
        tokenizer: Gives the vocabulary's size and the special tokens' ids.
        seed: Of the first weights. Sets torch's global generator.

    Returns:
        The model. A 64 px tile is 16 patches, and 4 tokens after pixel shuffle by 2.
    """
    pad_id = tokenizer.pad_token_id
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": CELL_SIZE_PX,
        "patch_size": PATCH_SIZE_PX,
        "initializer_range": 0.04,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_id,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config=vision,
        text_config=text,
        pad_token_id=pad_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Idefics3ForConditionalGeneration(config)


def load_trained(folder: Path) -> Idefics3ForConditionalGeneration:
    """Load a saved model in float32, to train it further."""
    return Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save_all(
    folder: Path,
    model: Idefics3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: Idefics3Processor,
) -> None:
    """Write a model folder in the layout of the Hugging Face Hub, weights in bfloat16.

    Args:
        folder: Made if missing; files in it are overwritten.
        model: Becomes bfloat16 in place.
        tokenizer: Goes with it.
        processor: Goes with it.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
