"""Sentences are read from files without running them, once, and a cache never changes what is read."""

import gc
import sys
from collections import Counter
from pathlib import Path

import pytest

from privfm.checks import InvalidArgument
from privfm.contracts import Table
from privfm.learning import docstrings
from privfm.learning.docstrings import Docstrings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "privfm"


@pytest.fixture
def networkx_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "LIBRARIES", ("networkx",))


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries, `first` and `second`, whose every file raises when it is run."""
    files = {
        "privfm_first/__init__.py": '"""The package of the first library, at length."""\nraise RuntimeError',
        "privfm_first/zebra.py": 'def f():\n  """Written late in the alphabet, read last of all."""',
        "privfm_first/inner/deep.py": '"""A module in a package inside the first library."""',
        "privfm_first/tests/test_f.py": '"""Sentences of tests are nobody\'s documentation."""',
        "privfm_first/broken.py": '"""This file is a template and no Python at all."""\nclass {{ name }}:',
        "privfm_second/a.py": '''
class A:
    """  First paragraph of a class,
    on   two lines.

    The second paragraph is left out.
    """
    if True:
        def method(self):
            """Return the method that stands below a condition."""
            async def inner():
                """Await the function that stands in a function."""
    try:
        pass
    except ValueError:
        def handler(self):
            """Handle what was raised, for the sake of this test."""
    match 1:
        case 1:
            def case(self):
                """Match the case in which nothing else would do."""
    x = 1
    """A text that is no docstring, after an assignment."""
    def short(self):
        """Too short to keep."""
    def long(self):
        """%s"""
def shared():
    """THE package of the first library, at length."""
'''
        % ("word " * 100),
        "privfm_second/_linked.py": "",
    }
    for name, content in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "site" / "privfm_second" / "dangling.py").symlink_to("nowhere.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(docstrings, "LIBRARIES", ("first", "second"))
    monkeypatch.setattr(docstrings, "PACKAGES", {"first": "privfm_first", "second": "privfm_second"})
    monkeypatch.setattr(docstrings, "version", lambda library: "1.0")


def rows(table: Table) -> list[tuple[str, str, str]]:
    assert table.clients is not None
    labels = [table.label_names[label] for label in table.labels.tolist()]
    return list(zip(labels, table.clients, table.inputs, strict=True))


@pytest.mark.usefixtures("made_up")
def test_first_paragraphs_of_all_docstrings_are_read_in_order_and_nothing_is_run() -> None:
    assert rows(Docstrings().load()) == [
        ("first", "privfm_first", "The package of the first library, at length."),
        ("first", "privfm_first.inner", "A module in a package inside the first library."),
        ("first", "privfm_first.zebra", "Written late in the alphabet, read last of all."),
        ("second", "privfm_second.a", "First paragraph of a class, on two lines."),
        ("second", "privfm_second.a", "Return the method that stands below a condition."),
        ("second", "privfm_second.a", "Await the function that stands in a function."),
        ("second", "privfm_second.a", "Handle what was raised, for the sake of this test."),
        ("second", "privfm_second.a", "Match the case in which nothing else would do."),
    ]
    assert not {"privfm_first", "privfm_second"} & set(sys.modules)


def test_all_six_libraries_as_installed() -> None:
    table = Docstrings().load()
    assert table.label_names == ("stdlib", "numpy", "scipy", "scikit-learn", "sympy", "networkx")
    counts = table.labels.bincount(minlength=6)
    assert counts.min() > 1000
    assert {"email", "json", "numpy.linalg", "scipy.stats", "sklearn.svm", "sympy.core"} <= set(table.clients or ())
    assert len({text.casefold() for text in table.inputs}) == len(table)
    assert all(30 <= len(text) <= 400 and text == " ".join(text.split()) for text in table.inputs)
    assert gc.isenabled()

    sample = Docstrings(limit=6000).load()
    assert len(sample) == 6000
    shares = sample.labels.bincount(minlength=6) / 6000
    assert (shares - counts / len(table)).abs().max() < 0.02  # three standard errors of the largest share


@pytest.mark.usefixtures("networkx_only")
def test_a_smaller_sample_is_part_of_a_larger_one_and_in_the_same_order() -> None:
    everything, larger, smaller = (rows(Docstrings(limit).load()) for limit in (None, 500, 100))
    assert len(larger) == 500
    assert len(smaller) == 100
    assert [row for row in larger if row in smaller] == smaller
    assert [row for row in everything if row in larger] == larger
    assert rows(Docstrings(10**9).load()) == everything


@pytest.mark.usefixtures("made_up")
def test_the_second_time_nothing_is_parsed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = rows(Docstrings().load())
    monkeypatch.setattr(docstrings, "_build", lambda: pytest.fail("built again"))
    assert rows(Docstrings().load()) == built
    assert Counter(path.suffix for path in cache.iterdir()) == {".json": 1}


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{}", b"0" * 64 + b"\n[]"])
def test_a_broken_cache_file_is_built_again_and_mended(cache: Path, damage: bytes) -> None:
    built = rows(Docstrings().load())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for broken in (damage, whole[:-10], whole.replace(b"library", b"libRary", 1)):
        file.write_bytes(broken)
        assert rows(Docstrings().load()) == built
        assert file.read_bytes() == whole


@pytest.mark.usefixtures("made_up")
def test_another_version_has_a_cache_file_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Docstrings().load()
    monkeypatch.setattr(docstrings, "version", lambda library: "2.0")
    Docstrings().load()
    monkeypatch.setattr(docstrings, "FORMAT", 0)
    Docstrings().load()
    assert len(list(cache.iterdir())) == 3


@pytest.mark.usefixtures("made_up")
def test_acache_folder_that_cannot_be_written_means_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert rows(Docstrings().load()) == rows(Docstrings().load())
    assert (tmp_path / "cache").read_text() == "a file where the folder should be"


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("setting", ["", "relative/folder"])
def test_without_a_usable_setting_the_cache_is_in_the_home_folder(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", setting)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Docstrings().load()
    assert len(list((tmp_path / "home" / ".cache" / "privfm").iterdir())) == 1


def test_a_library_that_is_not_installed_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "LIBRARIES", ("stdlib", "privfm-no-such-library"))
    monkeypatch.setattr(docstrings, "_build", lambda: pytest.fail("work was started"))
    with pytest.raises(InvalidArgument, match=r"reads privfm-no-such-library, .*pip install privfm\[demo\]"):
        Docstrings().load()


@pytest.mark.usefixtures("made_up")
def test_a_library_without_its_folder_or_its_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "privfm_second" / "a.py").unlink()
    with pytest.raises(InvalidArgument, match="no sentence of second: no source files in"):
        Docstrings().load()
    monkeypatch.setattr(docstrings, "PACKAGES", {"first": "privfm_first", "second": "privfm_no_such_folder"})
    with pytest.raises(InvalidArgument, match=r"no folder of second; run: pip install privfm\[demo\]"):
        Docstrings().load()


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_a_bad_limit_is_refused_at_once(limit: int) -> None:
    with pytest.raises(InvalidArgument, match="limit="):
        Docstrings(limit)
