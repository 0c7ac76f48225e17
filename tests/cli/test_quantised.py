"""Commands on a checkpoint that bitsandbytes has quantised."""

from pathlib import Path

import pytest
import torch
from command_line import TRAIN, Command, Place
from quantised_models import needs_bitsandbytes, quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import sylva_compile

pytestmark = [
    needs_bitsandbytes,
    quiet,
    # PEFT makes a sparse tensor and neither asks for checks nor declines them.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def packed(tmp_path: Path, place: Place) -> Path:
    """Return the folder of the tiny model in NF4."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        place.model, quantization_config=nf4, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(place.model).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


@pytest.mark.parametrize("bf16", [False, True])
def test_from_training_to_a_dense_checkpoint(
    bf16: bool, packed: Path, tmp_path: Path, command: Command, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    run, dense = tmp_path / "run", tmp_path / "dense"
    options = ["--column", "text", *TRAIN, "--method", "random", *(["--bf16"] if bf16 else [])]
    assert command("finetune", "--model", packed, "--data", place.table, "--out", run, *options).code == 0
    adapter = ["--model", packed, "--adapter", run]

    refused = command("merge", *adapter, "--out", dense)
    assert refused.code == 1 and refused.err.endswith("give --dequantise for a checkpoint with dense ones.\n")
    assert refused.err.count("\n") == 1 and not dense.exists()

    caplog.clear()
    assert command("merge", *adapter, "--out", dense, "--dequantise").out == f"checkpoint: {dense}\n"
    # The frozen weights are in the dtype of the training, so that none differs.
    assert not [record for record in caplog.records if "was trained beside" in record.getMessage()]
    trained = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16 if bf16 else torch.float32)
    sylva_compile.load_adapter(trained, run)
    sylva_compile.merge_and_unload(trained, dequantise=True)
    merged = AutoModelForCausalLM.from_pretrained(dense)
    assert not hasattr(merged.config, "quantization_config")
    for name, value in merged.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name

    assert command("report", *adapter, "--out", tmp_path / "page.html").code == 0
    assert command("inspect", run).code == 0


def test_an_adapter_of_peft_takes_no_dense_layers(packed: Path, tmp_path: Path, command: Command, place: Place) -> None:
    arguments = ["--model", packed, "--adapter", place.run, "--out", tmp_path / "shira", "--format", "shira"]
    found = command("export", *arguments, "--dequantise")
    assert found.code == 2 and "leave it out, or give --format dense" in found.err
    assert not (tmp_path / "shira").exists()
    # The adapter of a dense base is none of the quantised one.
    assert command("export", *arguments).code == 1
