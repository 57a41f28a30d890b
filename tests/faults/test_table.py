"""Each cell of the table of faults, in virtual time; and the page that is made of it."""

from __future__ import annotations

import ast
import collections
import itertools
from pathlib import Path

import pytest

from tests.faults.__main__ import PAGE, page
from tests.faults.cells import CELLS, FAULTS, Cell
from tests.faults.cluster import Cluster
from tests.faults.injection import EDGES, MEMORY_EDGES, requests, variants

ROOT = Path(__file__).resolve().parent.parent.parent
SETTLED_WITHIN_S = 100.0


def storm(cell: Cell) -> collections.Counter[str]:
    """The ends that requests had in all variants of a cell; each is checked here."""
    ends: collections.Counter[str] = collections.Counter()
    for name, begin in variants(cell.edge, cell.fault):
        cluster = Cluster()
        begin(cluster)
        asks = requests(cluster)
        for i, ask in enumerate(asks):
            cluster.ask(ask, after_s=0.004 * i)
        cluster.clock.after(0.05, lambda cluster=cluster, ask=asks[-1]: cluster.endpoint.cancel(ask))  # type: ignore[misc]
        settled = cluster.settle(SETTLED_WITHIN_S)
        for ask in asks:
            truth = ask.truth()
            assert ask.tokens == truth[: len(ask.tokens)], f"{name}: {ask.request_id} is wrong"
            assert ask.end != "finished" or ask.tokens == truth, f"{name}: {ask.request_id} is not whole"
            assert ask.end, f"{name}: {ask.request_id} has no end"
            ends[ask.end] += 1
        assert settled, f"{name}: still held: {cluster.held()}"
    return ends


IN_CLUSTER = [cell for cell in CELLS if cell.ends]


@pytest.mark.parametrize("cell", IN_CLUSTER, ids=[f"{cell.edge} {cell.fault}" for cell in IN_CLUSTER])
def test_the_outcome_is_the_cells_no_answer_is_wrong_none_is_missing_and_nothing_stays_held(cell: Cell) -> None:
    ends = storm(cell)
    assert ends.keys() - {"cancelled"} == set(cell.ends), ends


def test_every_edge_has_every_fault_once() -> None:
    edges = list(dict.fromkeys(cell.edge for cell in CELLS))
    assert set(edges) == {*EDGES, *MEMORY_EDGES, "client–endpoint"}
    assert [(cell.edge, cell.fault) for cell in CELLS] == list(itertools.product(edges, FAULTS))


def test_every_cell_is_shown_by_tests_that_exist() -> None:
    for cell in CELLS:
        assert cell.ends or cell.tests, cell
        for name in cell.tests:
            path, _, function = name.partition("::")
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert any(one.startswith(function) for one in names), name


def test_an_undisturbed_cluster_answers_and_its_messages_are_of_all_kinds_that_are_disturbed() -> None:
    cluster = Cluster()
    asks = requests(cluster)
    for ask in asks:
        cluster.ask(ask, after_s=0.0)
    cluster.clock.after(0.01, lambda: cluster.endpoint.cancel(asks[-1]))
    assert cluster.settle(10.0)
    assert [ask.end for ask in asks] == ["finished"] * 5 + ["cancelled"]
    assert all(ask.tokens == ask.truth() for ask in asks[:-1])
    seen = {(packet.source, packet.target, packet.kind) for packet, _ in cluster.seen}
    rare = {"DropEncode"}
    for edge, ways in EDGES.items():
        if edge != "prefill–decode":
            for (source, target), kinds in ways.items():
                assert {(source, target, kind) for kind in kinds if kind not in rare} <= seen, edge


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `python -m tests.faults`"
