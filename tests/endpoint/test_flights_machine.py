"""Any sequence of what brokers and clients may do to requests: each ends once, and no token is lost or repeated."""

import asyncio
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epd.messages import Cancel, Failed, Patch, RequestOutput

pytestmark = pytest.mark.engine
NUM_TOKENS = 6
FRAME = b"p" * 100


class Asked:
    """A request, seen from its client: the tokens it has got, and how it ended."""

    def __init__(self, may_go_on):
        self.may_go_on = may_go_on
        self.tokens, self.ends = [], []
        self.left = False

    def put(self, error):
        """As vLLM's collector: the caller gets this error."""
        self.ends.append(error.failure.code)


class Machine(RuleBasedStateMachine):
    """The flights between a broker and clients, both played here."""

    def __init__(self):
        super().__init__()
        from epd.config import EndpointConfig
        from epd.endpoint.engine.flights import Flights
        from epd.endpoint.ops.stories import Stories
        from epd.process.bounded import Beliefs

        config = EndpointConfig(max_waiting=3, max_held_bytes=1000)
        self.loop = asyncio.new_event_loop()
        self.beliefs, self.stories = Beliefs(), Stories(1000)
        self.flights = Flights(config, self.send, self.beliefs, self.stories)
        self.flights.processor = SimpleNamespace(
            request_states={}, abort_requests=lambda ids, internal: [i for i in ids if self.forget(i)]
        )
        self.asked = {}
        self.broker = None  # request id -> index of the token it makes next
        self.copies = 1  # of each message that comes

    def teardown(self):
        if self.broker is None:
            self.do(self.come)
        for request_id in list(self.broker):
            self.do(self.finish, request_id)
        assert len(self.flights) == 0 and self.flights.held_bytes == 0
        for request_id, asked in self.asked.items():
            (story,) = self.stories.find(request_id)
            if asked.left:
                assert story.state == "cancelled" and not asked.ends
            else:
                assert len(asked.ends) == 1, "one end, whatever has happened"
                assert story.state == {"length": "finished", "cancelled": "cancelled"}.get(asked.ends[0], "failed")
        self.loop.close()

    # --- in the places of the link and of vLLM

    def send(self, message, frames=()):
        if self.broker is None:
            return True
        if isinstance(message, Cancel):
            self.broker.pop(message.request_id, None)
            return True
        assert message.request_id not in self.broker, "no broker has a request twice"
        asked = self.asked[message.request_id]
        assert list(message.output_token_ids) == asked.tokens, "it goes on after what its client has"
        assert asked.may_go_on or not asked.tokens
        assert len(frames) == message.num_engine_frames + sum(patch.num_frames for patch in message.patches)
        if message.attempts:
            assert all(patch.num_frames for patch in message.patches)
        self.broker[message.request_id] = len(message.output_token_ids)
        return True

    def forget(self, request_id):
        return self.flights.processor.request_states.pop(request_id, None) is not None

    def do(self, call, *args):
        async def run():
            call(*args)

        self.loop.run_until_complete(run())
        while not self.flights.outputs.empty():
            output = self.flights.outputs.get_nowait()
            if output is None or output.request_id not in self.flights.processor.request_states:
                continue
            asked = self.asked[output.request_id]
            asked.tokens += output.new_token_ids
            if output.finished:
                asked.ends.append("length")
                self.forget(output.request_id)

    # --- what may happen

    @rule(may_go_on=st.booleans(), patches=st.lists(st.sampled_from("abc"), max_size=3, unique=True))
    def ask(self, may_go_on, patches):
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        from epd.endpoint.engine.submission import PipelineError
        from epd.multimodal.splitter import Split

        try:
            self.flights.check_room()
        except PipelineError as error:
            assert self.broker is None and error.failure.code == "not_ready"
            return
        request_id = f"r{len(self.asked)}x"
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, presence_penalty=0.0 if may_go_on else 0.5)
        request = EngineCoreRequest(request_id, [1, 2], None, params, None, 0.0, None, None, None)
        parts = [Patch(patch_hash=name, modality="image", num_tokens=1, num_frames=1) for name in patches]
        self.asked[request_id] = asked = Asked(may_go_on)
        queue = SimpleNamespace(put=asked.put, output=None)
        self.flights.processor.request_states[request_id] = SimpleNamespace(queue=queue, parent_req=None)
        self.do(self.flights.submit, request, Split(parts, [], [FRAME] * len(parts)), None)

    @precondition(lambda self: self.broker is None)
    @rule()
    def a_broker_comes(self):
        self.do(self.come)

    def come(self):
        self.broker = {}
        self.flights.on_registered()

    @precondition(lambda self: self.broker is not None)
    @rule()
    def the_broker_is_lost(self):
        self.broker = None
        self.beliefs.clear()
        self.do(self.flights.on_lost, "killed")

    @precondition(lambda self: self.broker)
    @rule(which=st.randoms(use_true_random=False), count=st.integers(1, 4))
    def tokens_come(self, which, count):
        request_id = which.choice(sorted(self.broker))
        for _ in range(count):
            if self.broker[request_id] == NUM_TOKENS - 1:
                self.do(self.finish, request_id)
                return
            self.do(self.give, request_id, None)

    def give(self, request_id, finish):
        from .fake_broker import output

        index = self.broker[request_id]
        self.broker[request_id] += 1
        frames = [bytes(frame) for frame in output(request_id, [index], finish)]
        fields = {"request_id": request_id, "token_ids": [index], "num_before": index}
        message = RequestOutput(**fields, finish_reason=finish) if finish else RequestOutput(**fields)
        for _ in range(self.copies):
            if self.flights.on_output(message, frames) and finish:
                self.flights.end(request_id)
                self.stories.close(request_id, "finished")

    def finish(self, request_id):
        while self.broker[request_id] < NUM_TOKENS - 1:
            self.give(request_id, None)
        self.give(request_id, "length")
        self.broker.pop(request_id, None)

    @rule(copies=st.integers(1, 2))
    def messages_are_repeated_or_not(self, copies):
        self.copies = copies

    @precondition(lambda self: self.broker)
    @rule(which=st.randoms(use_true_random=False))
    def a_token_is_lost(self, which):
        request_id = which.choice(sorted(self.broker))
        if self.broker[request_id] < NUM_TOKENS - 2:
            self.broker[request_id] += 1
            self.do(self.give, request_id, None)

    @precondition(lambda self: self.broker)
    @rule(which=st.randoms(use_true_random=False), code=st.sampled_from(["worker_lost", "pixels_needed"]))
    def a_request_fails(self, which, code):
        request_id = which.choice(sorted(self.broker))
        del self.broker[request_id]
        self.do(self.flights.on_failed, Failed(request_id=request_id, code=code, message="", status=502))

    @precondition(lambda self: len(self.flights))
    @rule(which=st.randoms(use_true_random=False), leaves=st.booleans())
    def a_request_is_cancelled(self, which, leaves):
        request_id = which.choice(sorted(each for each in self.asked if each in self.flights))
        if leaves:
            self.asked[request_id].left = True
            self.forget(request_id)
            self.do(self.flights.cancel, request_id, "disconnect")
        else:
            self.do(self.flights.cancel_all, [request_id])

    @precondition(lambda self: self.broker is None and len(self.flights))
    @rule(which=st.randoms(use_true_random=False))
    def patience_ends(self, which):
        request_id = which.choice(sorted(each for each in self.asked if each in self.flights))
        self.do(self.flights._on_no_broker, request_id)

    @rule(request_id=st.sampled_from(["r0x", "r1x", "nobody"]))
    def something_late_or_strange_comes(self, request_id):
        if request_id not in self.flights:
            before = {name: list(asked.tokens) for name, asked in self.asked.items()}
            self.do(self.flights.on_output, RequestOutput(request_id=request_id, token_ids=[7]), [b"\xc1"])
            self.do(self.flights.on_failed, Failed(request_id=request_id, code="worker_lost", message="", status=502))
            assert before == {name: asked.tokens for name, asked in self.asked.items()}

    @invariant()
    def every_client_has_its_tokens_in_order_and_nothing_is_held_for_nobody(self):
        for asked in self.asked.values():
            assert asked.tokens == list(range(len(asked.tokens)))
        in_flight = [name for name, asked in self.asked.items() if not asked.ends and not asked.left]
        assert sorted(in_flight) == sorted(self.flights.processor.request_states)
        assert len(in_flight) == len(self.flights)
        assert self.flights.num_waiting == (len(self.flights) if self.broker is None else 0)
        assert bool(self.flights.held_bytes) <= bool(in_flight)


TestFlights = Machine.TestCase
TestFlights.settings = settings(max_examples=50, stateful_step_count=50, deadline=None, derandomize=True, database=None)
