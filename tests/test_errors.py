"""Any exception is told in one line."""

import pydantic
import pytest

from epd.errors import one_line


class Sized(pydantic.BaseModel):
    width: int
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name == "x":
            raise ValueError("there is\nno x")
        return name


def test_each_complaint_of_pydantic_is_told_without_its_address():
    with pytest.raises(ValueError) as caught:
        Sized(width="wide", name="x")
    said = one_line(caught.value)
    assert said.startswith("width: Input should be a valid integer")
    assert said.endswith("(it is 'wide'); name: there is no x (it is 'x')")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  two\tthree "), "one two three"),
        (KeyError(), "KeyError"),
        (RuntimeError("x" * 9999), "x" * 500),
    ],
)
def test_lines_are_joined_and_bounded(error, said):
    assert one_line(error) == said
