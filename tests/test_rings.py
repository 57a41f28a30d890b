"""The table of what each ring of the tests costs: which ring a test is in, and what is read from pytest's reports."""

from pathlib import Path

import pytest

from tests import rings

ROOT = Path(__file__).resolve().parent.parent
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_docs" name="a" time="0.5"><properties><property name="ring" value="pure"/></properties>
</testcase>
<testcase classname="tests.pipeline.test_held" name="b" time="20.25">
<properties><property name="ring" value="engines"/></properties></testcase>
<testcase classname="tests.pipeline.test_slots" name="c[1]" time="1.5">
<properties><property name="ring" value="engines"/></properties></testcase>
<testcase classname="tests.gpu.test_cuda_ipc.TestHere" name="d" time="0.0">
<properties><property name="ring" value="GPU"/></properties><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    return path


@pytest.mark.parametrize(
    ("file", "markers", "ring"),
    [
        ("tests/wire/test_wire.py", (), rings.PURE),
        ("tests/broker/test_core_flow.py", ("parametrize",), rings.IN_MEMORY),
        ("tests/wire/test_link.py", ("asyncio",), rings.SOCKETS),
        ("tests/local/test_compiled.py", ("engine",), rings.ENGINES),
        ("tests/gpu/test_cuda_ipc.py", ("gpu",), rings.GPU),
    ],
)
def test_a_test_is_in_the_ring_of_its_marker_or_else_of_its_file(file, markers, ring):
    assert rings.ring_of(file, markers) == ring


def test_every_pattern_of_files_still_finds_some():
    missing = [each for patterns in rings.FILES.values() for each in patterns if not list(ROOT.glob(each))]
    assert not missing


def test_every_test_says_its_ring(request):
    assert dict(request.node.user_properties)["ring"] == rings.PURE


def test_costs_are_counted_by_ring_and_folder(report):
    found = rings.costs([report])
    assert found == {
        ("pure", "tests"): rings.Cost(1, 0, 0.5),
        ("engines", "tests/pipeline"): rings.Cost(2, 0, 21.75),
        ("GPU", "tests/gpu"): rings.Cost(1, 1, 0.0),
    }
    lines = rings.table(found).splitlines()
    assert len(lines) == 2 + len(rings.RINGS) + 2
    assert lines[-1] == "| **all** | | 4 | 22 |"
    assert "| | `tests/pipeline` | 2 | 22 |" in lines and any(line.endswith("| 1 (1 skipped) | 0 |") for line in lines)


def test_a_report_without_rings_is_refused(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text('<testsuite><testcase classname="a.b" name="c" time="1"/></testsuite>')
    with pytest.raises(ValueError, match=r"a\.b\.c has no ring"):
        rings.costs([path])


def test_the_page_has_the_table_of_all_rings(report, monkeypatch, tmp_path):
    page = tmp_path / "testing.md"
    page.write_text(rings.PAGE.read_text("utf-8"))
    assert all(f"| **{ring}** |" in page.read_text() for ring in rings.RINGS)
    monkeypatch.setattr(rings, "PAGE", page)
    assert rings.main([str(report)]) == 0
    once = page.read_text()
    assert "| **all** | | 4 | 22 |" in once and once.count(rings.BEGIN) == once.count(rings.END) == 1
    assert rings.main([str(report)]) == 0 and page.read_text() == once
