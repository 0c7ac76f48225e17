import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import sylva_compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_causal_lm.py"
SENTENCES = [
    f"The {kind} {place} near the {where} is {how}."
    for kind in ("cheap", "quiet", "famous", "old")
    for place in ("pub", "restaurant", "coffee shop")
    for where in ("river", "station")
    for how in ("good", "closed")
]
QUICK = ["--inner", "aot_eager", "--block-size", "16", "--sparsity", "0.5", "--num-samples", "16", "--steps", "8"]
QUICK += ["--batch-size", "4", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_causal_lm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def save_tiny_model(folder: Path, kind: str) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        GPT2LMHeadModel(
            GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)
        ).save_pretrained(folder)
    else:
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **ends,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_table(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["number", "text"])
        writer.writerows(enumerate(SENTENCES))
    return path


def held_out_losses(printed: str) -> tuple[float, float]:
    lines = [line for line in printed.splitlines() if line.startswith("held-out loss")]
    before, after = (float(line.split(": ")[1].split(",")[0]) for line in lines)
    return before, after


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_learns_from_a_table_and_writes_an_adapter(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = save_tiny_model(tmp_path / "model", kind)
    data = save_table(tmp_path / "data.csv")
    out = tmp_path / "adapter"
    example.main(["--model", str(model), "--data", str(data), "--column", "text", "--out", str(out), *QUICK])
    printed = capsys.readouterr().out
    before, after = held_out_losses(printed)
    assert after < before
    fresh = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    masks = sylva_compile.load_adapter(fresh, out)
    assert f"{len(masks)} of {len(masks)} weight gradients rewritten" in printed


def test_cuts_a_text_file_and_takes_every_option(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    data = tmp_path / "data.txt"
    data.write_text("\n".join(SENTENCES))
    out = tmp_path / "adapter"
    options = [
        "--max-length",
        "16",
        "--bf16",
        "--gradient-checkpointing",
        "--method",
        "magnitude",
        "--scope",
        "q_proj",
        "mlp.up_proj",
    ]
    example.main(["--model", str(model), "--data", str(data), "--out", str(out), *QUICK, *options])
    before, after = held_out_losses(capsys.readouterr().out)
    assert after < before
    assert (out / "sylva_adapter.json").is_file()


@pytest.mark.parametrize(
    ("names", "scope"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "mlp.up_proj"], ["q_proj", "mlp.up_proj"]),
        ([r".*_proj"], r".*_proj"),
    ],
)
def test_scopes(example: ModuleType, names: list[str], scope: str | list[str]) -> None:
    assert example.scope_of(names) == scope


def test_padding_carries_neither_attention_nor_loss(example: ModuleType, tmp_path: Path) -> None:
    tokenizer, _ = example.load_model(save_tiny_model(tmp_path, "gpt2"), torch.float32)
    rows = example.cut_into_sequences(["The pub", "The famous pub near the river"], tokenizer, 64, rows=True)
    assert len({len(ids) for ids in rows["input_ids"]}) == 1
    for ids, mask, labels in zip(rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True):
        assert [label for label in labels if label != example.IGNORED] == ids[: sum(mask)]
    assert sum(rows["attention_mask"][1]) == len(rows["input_ids"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "holds no config.json"),
        ({"--data": "nothing.txt"}, "is no file"),
        ({"--data": "data.txt"}, "is no .csv or .tsv file"),
        ({"--data": "short.csv"}, "gives 1 sequences, and training and testing need 8"),
        ({"--data": "empty.csv"}, "is empty"),
        ({"--data": "latin.csv"}, "is not UTF-8"),
        ({"--column": "txt"}, "has no column 'txt'; choose --column from number, text"),
        ({"--sparsity": "2"}, "sparsity=2.0"),
        ({"--batch-size": "0"}, "--batch-size must be above 0"),
        ({"--lr": "-1"}, "--lr must be above 0"),
        ({"--out": "data.txt/adapter"}, "--out data.txt/adapter cannot be made"),
    ],
)
def test_bad_input_ends_in_one_line(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("model"), "gpt2")
    save_table(Path("data.csv"))
    Path("data.txt").write_text("some text")
    Path("short.csv").write_text("number,text\n1,The pub\n")
    Path("empty.csv").write_text("")
    Path("latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    options = {"--model": "model", "--data": "data.csv", "--column": "text", "--batch-size": "4"} | change
    with pytest.raises(SystemExit) as caught:
        example.main([part for option in options.items() for part in option])
    said = str(caught.value)
    assert message in said
    assert said.startswith("error: ") and "\n" not in said
