"""The figures in README are those of the newest results."""

import pytest

from benchmarks import readme_tables


def test_readme_is_what_the_command_makes_of_the_results() -> None:
    readme_tables.main(["--check"])


def test_a_figure_changed_by_hand_shows() -> None:
    text = readme_tables.README.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| sylva_compile |"))
    assert readme_tables.rendered(text.replace(line, line.replace("|", "| 0", 1))) == text


def test_a_table_without_a_place_is_no_silent_loss() -> None:
    with pytest.raises(LookupError, match="no place"):
        readme_tables.rendered("")


def test_no_result_says_what_to_run() -> None:
    with pytest.raises(LookupError, match=r"python -m benchmarks\.step\."):
        readme_tables.newest("step", device="abacus")
