"""The figures in README and the pages are those of the newest results."""

import pytest

from benchmarks import readme_tables


def test_documents_are_what_the_command_makes_of_the_results() -> None:
    readme_tables.main(["--check"])


@pytest.mark.parametrize("document", [0, "cost.md"])
def test_a_figure_changed_by_hand_shows(document: int | str) -> None:
    found = next(path for path in readme_tables.DOCUMENTS if document in (0, path.name))
    text = found.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| sylva_compile |"))
    assert readme_tables.rendered(text.replace(line, line.replace("|", "| 0", 1))) == text


def test_a_table_without_a_place_is_no_silent_loss() -> None:
    with pytest.raises(LookupError, match="No document has a place"):
        readme_tables.check_places([""])


def test_a_place_for_an_unknown_table_is_told() -> None:
    with pytest.raises(LookupError, match="no table 'steps'"):
        readme_tables.rendered("<!-- table: steps -->\n<!-- end -->")


def test_no_result_says_what_to_run() -> None:
    with pytest.raises(LookupError, match=r"python -m benchmarks\.step\."):
        readme_tables.newest("step", device="abacus")
