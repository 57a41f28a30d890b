"""What the demo prints, from stories recorded from a real pipeline (two encode workers, one picture of 9 patches)."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from epd import builtin
from epd.demo import measure, pictures, show, timeline

STORIES = json.loads((Path(__file__).parent / "stories.json").read_text())
FIRST, SECOND = STORIES["first"], STORIES["second"]
NUMBERS = timeline.number_patches(SECOND, FIRST)


def printed(renderable, width=100, **options):
    console = Console(width=width, record=True, file=open(os.devnull, "w"), **options)  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_patches_are_numbered_as_the_story_with_hits_has_them():
    order = [event["patch"] for event in SECOND if event["event"] == "cache hit"]
    assert list(NUMBERS) == order
    assert list(NUMBERS.values()) == list(range(9))


def test_each_patch_was_encoded_by_one_of_the_two_workers():
    by_worker = timeline.encoded_by(FIRST)
    assert by_worker.keys() == NUMBERS.keys()
    assert set(by_worker.values()) == {"encode-0", "encode-1"}
    assert timeline.encoded_by(SECOND) == {}


def test_a_timeline_has_a_row_for_each_stage_and_patch():
    labels = [row.label for row in timeline.rows(FIRST, NUMBERS)]
    assert labels[0] == "queue"
    assert len([label for label in labels if "patch" in label]) == 9
    assert labels[-4:] == ["prefill-0  prefill", "prefill-0  push KV", "decode-0  first token", "decode-0  last token"]


def test_a_first_token_of_the_prefill_worker_comes_before_the_push():
    first, [at] = [], [at for at, event in enumerate(FIRST) if event["event"] == "first token"]
    for event in FIRST[:at]:
        first.append(event)
        if event["event"] == "prefilled":
            first.append(event | {"event": "first token"})
    first += [FIRST[at] | {"event": "decoding"}, *FIRST[at + 1 :]]
    rows = timeline.rows(first, NUMBERS)
    tail = ["prefill-0  prefill", "prefill-0  first token", "prefill-0  push KV", "decode-0  last token"]
    assert [row.label for row in rows[-4:]] == tail
    ends = [row.spans[-1].end_s for row in rows[-4:]]
    assert ends == sorted(ends)


def test_times_in_a_timeline_are_those_of_the_story():
    rows = {row.label: row for row in timeline.rows(FIRST, NUMBERS)}
    prefilled = next(event for event in FIRST if event["event"] == "prefilled")
    work = rows["prefill-0  prefill"].spans[-1]
    assert work.end_s == prefilled["at_s"]
    assert work.end_s - work.start_s == pytest.approx(prefilled["took_s"])
    token = next(event["at_s"] for event in FIRST if event["event"] == "first token")
    assert rows["decode-0  first token"].spans[-1].end_s == token
    assert all(0 <= span.start_s <= span.end_s for row in rows.values() for span in row.spans)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("unicode", [True, False])
def test_lines_are_as_wide_as_the_terminal_and_no_wider(width, unicode):
    lines = timeline.draw(timeline.rows(FIRST, NUMBERS), width, unicode=unicode)
    assert {len(f"{line.label} {line.bar} {line.figures}") for line in lines} == {max(width, 61)}
    assert all(str(line).isascii() for line in lines) or unicode


def test_bars_lie_where_their_times_are():
    row = timeline.Row("w  x", "w", (timeline.Span(0.0, 0.25, timeline.WAIT), timeline.Span(0.25, 0.5)))
    last = timeline.Row("w  y", "w", (timeline.Span(0.5, 1.0),))
    lines = timeline.draw([row, last], 22 + 17 + 2 + 40, unicode=False)
    assert lines[0].bar == "." * 10 + "#" * 10 + " " * 20
    assert lines[1].bar == " " * 20 + "#" * 20
    assert lines[0].figures.strip() == "250.0-500.0 ms"
    assert (lines[2].bar[:4], lines[2].bar[-7:]) == ("0 ms", "1000 ms")


def test_an_unfinished_story_gives_what_it_has():
    events = FIRST[: next(i for i, event in enumerate(FIRST) if event["event"] == "encoded") + 1]
    labels = [row.label for row in timeline.rows(events, NUMBERS)]
    assert len(labels) == 2
    assert timeline.draw(timeline.rows([], {}), 80)[0].bar.startswith("0 ms")


def test_the_patches_of_a_picture_are_shown_as_its_grid():
    text = printed(show.patches(timeline.encoded_by(FIRST), NUMBERS, (2, 4), {}))
    lines = text.splitlines()
    assert all(f" {number}: encode-" in lines[1] for number in (1, 2, 3, 4))
    assert all(f" {number}: encode-" in lines[3] for number in (5, 6, 7, 8))
    assert "and the whole, small:" in lines[0]
    assert " 9: encode-" in text


def test_patches_that_do_not_form_a_grid_are_shown_in_order():
    text = printed(show.patches(timeline.encoded_by(FIRST), NUMBERS, (5, 5), {}))
    assert "and the whole" not in text
    assert all(f"{number}: encode-" in text for number in range(1, 10))


def test_everything_is_legible_without_colour_at_100_columns():
    palette = show.colours([event.get("worker", "") for event in FIRST])
    rows = timeline.rows(FIRST, NUMBERS)
    text = printed(show.story(rows, 100, palette, unicode=True), no_color=True)
    assert max(map(len, text.splitlines())) <= 100
    assert "prefill-0  prefill" in text
    assert "at work" in text


def test_figures_say_what_they_are_and_leave_out_what_was_not_measured():
    found = show.Figures(ready_s=8.64, imported_s=4.9, num_processes=8, first_s=0.131, second_s=0.041, idle_cpu=0.027)
    text = printed(show.figures(found))
    assert "8.6 s  from start to ready" in text
    assert "2.7%  of one core for all 8 processes" in text
    assert "plain" not in text
    compared = show.Figures(
        **{name: getattr(found, name) for name in ("ready_s", "imported_s", "num_processes", "first_s", "second_s")},
        idle_cpu=0.0, pipeline_s=[0.03, 0.02, 0.04], plain_s=[0.01, 0.02, 0.03, 0.04],
    )  # fmt: skip
    assert "1.2  pipeline / plain vLLM" in printed(show.figures(compared))


def test_the_picture_is_drawn_with_characters():
    lines = pictures.characters(builtin.demo_image_path(), 48)
    assert len(lines) == 12
    assert {len(line) for line in lines} == {48}
    assert "@" in "".join(lines)


def test_variants_look_alike_and_differ_in_every_pixel_that_is_not_black(tmp_path):
    found = pictures.variants(builtin.demo_image_path(), 3)
    images = []
    for index, data in enumerate(found):
        (tmp_path / f"{index}.png").write_bytes(data)
        images.append(Image.open(tmp_path / f"{index}.png").tobytes())
    assert len(set(images)) == 3
    assert max(abs(a - b) for a, b in zip(images[0], images[2], strict=True)) == 2


def test_white_space_does_not_matter_for_the_truth():
    assert measure.normal(" 7 4\n1 6 ") == measure.normal("7 4 1 6")


async def test_idle_cpu_sees_work_and_idleness():
    before = measure.cpu_s(os.getpid())
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert measure.cpu_s(os.getpid()) - before >= 0.04
    assert measure.cpu_s(4_194_305) == 0.0
    assert await measure.idle_cpu([4_194_305], 0.01) == 0.0
