"""What leaves the cache index for new patches, and what stays."""

from tests.cache.test_index import index_of, need, needs, present, put


def test_the_least_recently_used_patch_leaves_first():
    index = index_of(3)
    for name in "abc":
        put(index, need(name))
    put(index, need("a"))
    put(index, need("d"))
    assert present(index, "abcd") == set("acd")
    assert index.stats().num_evictions == 1


def test_a_patch_that_costs_more_to_encode_stays_longer():
    index = index_of(3)
    put(index, need("a", cost_s=1.0))
    put(index, need("b", cost_s=0.1))
    put(index, need("c", cost_s=0.1))
    put(index, need("d", cost_s=0.1))
    assert present(index, "abcd") == set("acd")


def test_what_a_patch_costs_is_what_was_known_when_it_was_last_used():
    index = index_of(3)
    put(index, need("a"))  # the first of all: nobody knows yet
    put(index, need("b", cost_s=0.1))
    put(index, need("c", cost_s=0.1))
    put(index, need("a", cost_s=0.1))
    put(index, need("d", cost_s=0.1))
    assert present(index, "abcd") == set("acd")


def test_several_patches_leave_for_a_large_one():
    index = index_of(4)
    put(index, *needs("abcd"))
    put(index, need("e", 3))
    assert len(present(index, "abcd")) == 1


def test_what_need_not_leave_stays_though_it_was_the_next_to_go():
    index = index_of(5)
    put(index, *needs("abcde"))
    for name in "caedb":  # the order in which they leave; the first two neighbours among them are c and d
        put(index, need(name))
    put(index, need("f", 2))
    assert index.stats().num_evictions == 2
    assert present(index, "abcde") == set("abe")


def test_a_pinned_patch_is_never_evicted():
    index = index_of(2)
    put(index, need("a"))
    index.acquire_all(needs("a"), "r")
    put(index, need("b"))
    put(index, need("c"))
    assert present(index, "abc") == set("ac")
    assert index.acquire_all([need("d", 2)], "r2") is None


def test_a_patch_takes_the_memory_of_the_one_of_its_size_that_leaves():
    index = index_of(3)
    put(index, *needs("abc"))
    offset = index.slot("b").offset
    for name in "bca":  # the order in which they leave
        put(index, need(name))
    put(index, need("d"))
    assert (index.slot("d").offset, present(index, "abc")) == (offset, set("ac"))
    assert index.stats().used_bytes == index.stats().total_bytes
