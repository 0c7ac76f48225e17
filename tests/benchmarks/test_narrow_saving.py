"""One narrow copy for three layers takes fewer bytes; where attention keeps the activation, no copy is kept."""

from benchmarks import narrow_saving


def test_small() -> None:
    options = ["--hidden", "256", "--tokens", "256", "--block-size", "32", "--columns", "3"]
    results = narrow_saving.main([*options, "--inner", "aot_eager", "--no-write"])
    three, kept = results["three readers"], results["kept by attention"]
    slack = 4096  # positions and lines
    assert three["shared copy"] < three["own copies"] - slack
    assert three["shared copy"] < three["frozen"] + three["whole activation"]
    assert kept["shared copy"] <= kept["frozen"] + slack
