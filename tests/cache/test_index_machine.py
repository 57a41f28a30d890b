"""The cache index against a simple model, by random operations.

`EPD_INDEX_OPERATIONS` sets how many operations are tried (default 20,000: some seconds).
"""

import os
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cache.index import CacheIndex, FencedError, Outcome, PatchNeed, State
from cache.slot import slot_bytes
from epd.messages import Pool

OPERATIONS = int(os.environ.get("EPD_INDEX_OPERATIONS", "20000"))
STEPS = 80

UNIT = slot_bytes(1, 64, "float16")
NEEDS = [PatchNeed(f"h{n}", 2 * (1, 1, 2, 3)[n % 4] - 1, 64, "float16", (0.0, 0.1)[n % 2]) for n in range(12)]
POOLS = {f"p{n}": units * UNIT for n, units in enumerate((6, 9))}
HOLDERS = [f"r{n}" for n in range(5)]


@dataclass
class Model:
    """What is known of one patch."""

    state: State
    generation: int
    holders: set = field(default_factory=set)


class IndexMachine(RuleBasedStateMachine):
    num_operations = 0

    def __init__(self):
        super().__init__()
        self.index = CacheIndex(first_generation=7)
        self.model = {}
        self.generations = set()  # every one ever given out
        self.quarantined = {}  # generation -> slot
        self.evictions = 0
        self.add_pool("p0")

    # ---- operations ------------------------------------------------------------------------------------------------

    @rule(pool_id=st.sampled_from(sorted(POOLS)))
    def add_pool(self, pool_id):
        if pool_id in self.pool_ids():
            return
        self.index.add_pool(Pool(pool_id=pool_id, kind="k", name=pool_id, nbytes=POOLS[pool_id], host="h"))

    @precondition(lambda self: len(self.pool_ids()) > 1)
    @rule(pool_id=st.sampled_from(sorted(POOLS)))
    def remove_pool(self, pool_id):
        there = {h for h in self.model if (slot := self.index.slot(h)) and slot.pool_id == pool_id}
        assert set(self.index.in_pool(pool_id)) == there
        assert set(self.index.remove_pool(pool_id)) == there
        for patch_hash in there:
            self.lose(patch_hash)
        self.quarantined = {g: slot for g, slot in self.quarantined.items() if slot.pool_id != pool_id}

    @rule(
        needs=st.lists(st.sampled_from(NEEDS), min_size=1, max_size=5),
        holder=st.sampled_from(HOLDERS),
        prefer=st.sampled_from([None, *POOLS]),
    )
    def acquire(self, needs, holder, prefer):
        before = self.snapshot()
        wanted = list(dict.fromkeys(need.patch_hash for need in needs))
        acquired = self.index.acquire_all(needs, holder, prefer_pool=prefer)
        if acquired is None:
            assert self.snapshot() == before, "a refused request changed something"
            idle = all(m.state is State.READY and not m.holders for m in self.model.values()) and not self.quarantined
            assert not (idle and self.index.could_ever_fit(needs)), "waiting would never help"
            return
        assert self.index.could_ever_fit(needs)
        assert [item.patch_hash for item in acquired] == wanted
        idle = all(m.state is State.READY and not m.holders for m in self.model.values())
        for item in acquired:
            known = self.model.get(item.patch_hash)
            if item.outcome is Outcome.NEW:
                # A needed patch that was ready is given up only where nothing else could.
                assert known is None or known.state is State.LOST or idle
                fresh = Model(State.ALLOCATED, self.fresh(item.slot), known.holders if known else set())
                self.evictions += known is not None and known.state is State.READY
                self.model[item.patch_hash] = fresh
            else:
                ready = item.outcome is Outcome.HIT
                assert known.state is (State.READY if ready else State.ALLOCATED)
                assert item.slot.generation == known.generation
            self.model[item.patch_hash].holders.add(holder)
        self.forget_evicted()

    @rule(
        needs=st.lists(st.sampled_from(NEEDS), min_size=1, max_size=5),
        holder=st.sampled_from(HOLDERS),
        prefer=st.sampled_from([None, *POOLS]),
    )
    def serve(self, needs, holder, prefer):
        """A whole request, so that there is much in the cache that may leave."""
        self.acquire(needs, holder, prefer)
        self.finish(holder)

    @rule(holder=st.sampled_from(HOLDERS))
    def finish(self, holder):
        for need in NEEDS:
            if holder in self.index.holders(need.patch_hash):
                self.commit(need)
        self.release(holder)

    @rule()
    def finish_all(self):
        for holder in HOLDERS:
            self.finish(holder)
        for generation in list(self.quarantined):
            del self.quarantined[generation]
            assert self.index.lift_quarantine(generation)

    @rule(patch=st.sampled_from(NEEDS))
    def commit(self, patch):
        known = self.model.get(patch.patch_hash)
        generation = known.generation if known else 7
        done = self.index.commit(patch.patch_hash, generation)
        assert done == (known is not None and known.state is State.ALLOCATED)
        if done:
            known.state = State.READY

    @precondition(lambda self: self.generations)
    @rule(patch=st.sampled_from(NEEDS), seed=st.integers(0, 2**16))
    def name_an_old_generation(self, patch, seed):
        known = self.model.get(patch.patch_hash)
        generation = random.Random(seed).choice(sorted(self.generations))
        if known and known.generation == generation:
            return
        before = self.snapshot()
        assert not self.index.is_current(patch.patch_hash, generation)
        assert not self.index.commit(patch.patch_hash, generation)
        assert not self.index.drop(patch.patch_hash, generation)
        with pytest.raises(FencedError):
            self.index.renew(patch.patch_hash, generation)
        assert self.snapshot() == before

    @rule(patch=st.sampled_from(NEEDS), quarantine=st.booleans())
    def renew(self, patch, quarantine):
        known = self.model.get(patch.patch_hash)
        if known is None:
            return
        old = self.index.slot(patch.patch_hash)
        slot = self.index.renew(patch.patch_hash, known.generation, quarantine=quarantine)
        assert slot or quarantine or old is None, "its own memory is always there"
        if quarantine and old:
            self.quarantined[known.generation] = old
        if slot:
            if old and not quarantine:
                assert (slot.pool_id, slot.offset) == (old.pool_id, old.offset)
            known.state, known.generation = State.ALLOCATED, self.fresh(slot)
        else:
            self.lose(patch.patch_hash)
        self.forget_evicted()

    @rule(patch=st.sampled_from(NEEDS), quarantine=st.booleans())
    def drop(self, patch, quarantine):
        known = self.model.get(patch.patch_hash)
        if known is None:
            return
        old = self.index.slot(patch.patch_hash)
        assert self.index.drop(patch.patch_hash, known.generation, quarantine=quarantine)
        if quarantine and old:
            self.quarantined[known.generation] = old
        self.lose(patch.patch_hash)

    @precondition(lambda self: self.quarantined)
    @rule(seed=st.integers(0, 2**16))
    def lift_quarantine(self, seed):
        generation = random.Random(seed).choice(sorted(self.quarantined))
        del self.quarantined[generation]
        assert self.index.lift_quarantine(generation)
        assert not self.index.lift_quarantine(generation)

    @rule(holder=st.sampled_from(HOLDERS))
    def release(self, holder):
        unneeded = set()
        for patch_hash, known in list(self.model.items()):
            if holder in known.holders:
                known.holders.remove(holder)
                if not known.holders and known.state is State.ALLOCATED:
                    unneeded.add(patch_hash)
                if not known.holders and known.state is State.LOST:
                    del self.model[patch_hash]
        assert set(self.index.release(holder)) == unneeded
        assert self.index.release(holder) == []

    # ---- what must hold after each ---------------------------------------------------------------------------------

    @invariant()
    def the_index_agrees_with_the_model(self):
        type(self).num_operations += 1
        for need in NEEDS:
            known, slot = self.model.get(need.patch_hash), self.index.slot(need.patch_hash)
            assert self.index.state(need.patch_hash) is (known.state if known else None)
            assert set(self.index.holders(need.patch_hash)) == (known.holders if known else set())
            assert (slot is not None) == (known is not None and known.state is not State.LOST)
            if slot:
                assert slot.generation == known.generation
                assert slot.nbytes == need.nbytes == slot_bytes(slot.num_tokens, slot.width, slot.dtype)
            readable = known is not None and known.state is State.READY
            assert self.index.readable(need.patch_hash) == (slot if readable else None)

    @invariant()
    def live_extents_never_overlap_and_all_bytes_add_up(self):
        slots = [slot for need in NEEDS if (slot := self.index.slot(need.patch_hash))] + [*self.quarantined.values()]
        for pool_id in self.pool_ids():
            end = 0
            for slot in sorted((s for s in slots if s.pool_id == pool_id), key=lambda s: s.offset):
                assert slot.offset >= end, "two extents overlap"
                end = slot.offset + slot.nbytes
            assert end <= POOLS[pool_id]
        stats = self.index.stats()
        assert stats.used_bytes == sum(slot.nbytes for slot in slots)
        assert stats.quarantined_bytes == sum(slot.nbytes for slot in self.quarantined.values())
        assert stats.total_bytes == sum(POOLS[pool_id] for pool_id in self.pool_ids())
        assert stats.num_pins == sum(len(known.holders) for known in self.model.values())
        assert stats.num_evictions == self.evictions
        known = [(need, self.model[need.patch_hash]) for need in NEEDS if need.patch_hash in self.model]
        for state, count in ((State.ALLOCATED, stats.num_allocated), (State.READY, stats.num_ready)):
            assert count == sum(one.state is state for _, one in known)
        assert stats.num_lost == sum(one.state is State.LOST for _, one in known)
        assert stats.num_embeddings == sum(need.num_tokens for need, one in known if one.state is State.READY)
        pinned = [self.index.slot(need.patch_hash) for need, one in known if one.holders]
        assert stats.pinned_bytes == sum(slot.nbytes for slot in pinned if slot)

    def teardown(self):
        """With everything released, committed and lifted, nothing is left that could not leave."""
        for holder in HOLDERS:
            for patch_hash in self.index.release(holder):
                self.index.drop(patch_hash, self.index.slot(patch_hash).generation)
        for need in NEEDS:
            if self.index.state(need.patch_hash) is State.ALLOCATED:
                self.index.drop(need.patch_hash, self.index.slot(need.patch_hash).generation)
        for generation in self.quarantined:
            self.index.lift_quarantine(generation)
        whole = [PatchNeed(f"whole {p}", 2 * (POOLS[p] // UNIT) - 1, 64, "float16") for p in self.pool_ids()]
        assert self.index.acquire_all(whole, "last"), "memory leaked"
        assert self.index.stats().used_bytes == self.index.stats().total_bytes

    # ---- help ------------------------------------------------------------------------------------------------------

    def pool_ids(self):
        return [pool.pool_id for pool in self.index.pools]

    def snapshot(self):
        entries = [(n.patch_hash, self.index.slot(n.patch_hash), self.index.holders(n.patch_hash)) for n in NEEDS]
        return entries, self.index.stats()

    def fresh(self, slot):
        assert slot.generation not in self.generations
        assert slot.generation > max(self.generations, default=6)
        self.generations.add(slot.generation)
        return slot.generation

    def lose(self, patch_hash):
        self.model[patch_hash].state = State.LOST
        if not self.model[patch_hash].holders:
            del self.model[patch_hash]

    def forget_evicted(self):
        for patch_hash, known in list(self.model.items()):
            if self.index.state(patch_hash) is None:
                assert known.state is State.READY and not known.holders, "a patch in use was evicted"
                del self.model[patch_hash]
                self.evictions += 1


@pytest.mark.timeout(1800)
def test_no_sequence_of_operations_breaks_the_index():
    IndexMachine.num_operations = 0
    run_state_machine_as_test(
        IndexMachine,
        settings=settings(
            max_examples=max(1, OPERATIONS // STEPS),
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{IndexMachine.num_operations} operations")
