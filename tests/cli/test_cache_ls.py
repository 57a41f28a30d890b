"""`epd cache ls`: the picture of the pools."""

import io

import msgspec
from rich.console import Console

from epd.cli.cache_ls import draw
from epd.messages import Counters, Pool, PoolFill

POOL = Pool(pool_id="ab12", kind="shared_memory", name="/dev/shm/epd-ab12", nbytes=1 << 20, host="here")


def printed(told, unicode=True):
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(draw(told, 80, unicode=unicode))
    return console.file.getvalue()


def told(*fills, **counters):
    return msgspec.to_builtins({"pools": list(fills), "counters": Counters(**counters)})


def test_a_pool_is_drawn_with_its_fill_and_a_legend():
    fill = PoolFill(
        pool=POOL, bytes_by_state={"pinned": 2048, "ready": 512 << 10}, num_patches=7, cells="p" + "r" * 31 + "." * 32
    )  # fmt: skip
    text = printed(told(fill, num_encoded=10, num_cache_hits=30, encode_s_saved=1.25))
    assert "ab12  shared_memory on here: 514.0 KiB of 1.0 MiB, 7 patches" in text
    assert "█" + "▓" * 31 + "·" * 32 in text
    assert "510.0 KiB" in text, "what is free"
    assert "10 encoded, 30 hits, 0 coalesced (75% of what was asked for)" in text
    assert "1.2 s of encoding saved" in text


def test_it_can_be_read_without_unicode():
    fill = PoolFill(pool=POOL, bytes_by_state={}, num_patches=0, cells="aq" + "." * 62)
    text = printed(told(fill), unicode=False)
    assert "ox" + "." * 62 in text
    assert text.isascii()


def test_no_pool_is_said_in_words():
    assert "no cache daemon is registered" in printed(told())
