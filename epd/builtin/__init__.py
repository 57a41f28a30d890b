"""The model and the picture that come with EPD, so that everything can be tried without a download.

Lives in any process; owns nothing but file names. Standard library only: importing it loads neither
torch nor vLLM. The model itself is described in `digit_reader/MODEL_CARD.md` and is made by
`examples/digit_reader/`.
"""

from importlib import resources
from pathlib import Path

__all__ = ["DEMO_ANSWER", "DEMO_QUESTION", "MODEL_NAME", "demo_image_path", "model_path"]

MODEL_NAME = "epd/digit-reader"
"""The name under which the built-in model is served."""

DEMO_QUESTION = "Read the grid."
"""A question to ask about the picture at `demo_image_path`."""

DEMO_ANSWER = "7 4 1 6\n7 4 0 9"
"""What is in the picture at `demo_image_path`: the truth, and also what the model answers."""


def model_path() -> Path:
    """Return the folder of the built-in model, in the layout of the Hugging Face Hub.

    Returns:
        A folder to give to vLLM or transformers as the model. Read-only by convention.
    """
    return _resource_path("digit_reader")


def demo_image_path() -> Path:
    """Return the built-in picture: two rows of four handwritten digits, 256 x 128 pixels.

    Returns:
        A PNG file. Its digits are from the held-out split, which the model was not trained on.
    """
    return _resource_path("demo.png")


def _resource_path(name: str) -> Path:
    # EPD is installed as plain files, never as a zip, so a resource's string is a real path.
    return Path(str(resources.files(__name__) / name))
