"""The stories of requests, found by the ids that clients know."""

from epd.endpoint.ops.stories import Stories, describe
from epd.messages import StoryEvent

EVENTS = [StoryEvent(at_s=0.0, event="accepted"), StoryEvent(at_s=1.0, event="finished")]


def test_a_request_is_found_by_the_id_in_its_answer():
    stories = Stories(10)
    stories.open("chatcmpl-a-1b2c3d4e", "chatcmpl-a")
    assert [each.state for each in stories.find("chatcmpl-a")] == ["in_flight"]
    stories.close("chatcmpl-a-1b2c3d4e", "finished", "length", EVENTS)
    told = describe("chatcmpl-a", stories.find("chatcmpl-a"))
    assert told["state"] == "finished"
    assert [event["event"] for event in told["events"]] == ["accepted", "finished"]


def test_the_children_of_one_request_are_told_together_by_time():
    stories = Stories(10)
    for child in ("0_chatcmpl-a-x", "1_chatcmpl-a-x"):
        stories.open(child, "chatcmpl-a")
        stories.close(child, "finished", "stop", EVENTS)
    told = describe("chatcmpl-a", stories.find("chatcmpl-a"))
    assert [part["request_id"] for part in told["requests"]] == ["0_chatcmpl-a-x", "1_chatcmpl-a-x"]
    assert [event["at_s"] for event in told["events"]] == [0.0, 0.0, 1.0, 1.0]


def test_prompts_and_turns_are_found_by_the_id_without_their_counter():
    stories = Stories(10)
    for i in range(2):
        stories.open(f"cmpl-b-{i}-x", f"cmpl-b-{i}")
    stories.open("resp_c_0-x", "resp_c_0")
    assert len(stories.find("cmpl-b")) == 2
    assert len(stories.find("cmpl-b-1")) == 1
    assert len(stories.find("resp_c")) == 1
    assert stories.find("cmpl") == []


def test_one_failed_part_makes_the_whole_failed():
    stories = Stories(10)
    for child, state in (("0_a-x", "failed"), ("1_a-x", "cancelled")):
        stories.open(child, "a")
        stories.close(child, state)
    assert describe("a", stories.find("a"))["state"] == "failed"


def test_only_the_last_ended_are_kept_and_all_in_flight():
    stories = Stories(2)
    for i in range(5):
        stories.open(f"r{i}-x", f"r{i}")
    for i in (1, 2, 3):
        stories.close(f"r{i}-x", "finished")
    assert [bool(stories.find(f"r{i}")) for i in range(5)] == [True, False, True, True, True]


def test_a_story_that_comes_late_completes_one_that_was_cancelled():
    stories = Stories(2)
    stories.open("r-x", "r")
    stories.close("r-x", "cancelled", "disconnect")
    stories.close("r-x", "finished", "length", EVENTS)
    (story,) = stories.find("r")
    assert story.state == "cancelled" and story.events == EVENTS
