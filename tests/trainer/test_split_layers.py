"""--split_layers: a model whose layers several ranks share trains as one process does, and resumes with other cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, Train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.data.tokenizer import own_tokenizer
from trainer.errors import UserError
from trainer.estimate.stages import PLANNED, layer_of, other_shards
from trainer.split import self_check
from trainer.split.cutting import choose_cuts, shares
from trainer.split.loading import load_stage
from trainer.split.stage import Cut, Elsewhere, cuts, layers_of, leave_out
from trainer.training import split_building

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mistral", "phi3", "mixtral", "opt",
            "bloom", "falcon", "olmo2", "qwen3_moe"]
SHAPE: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 128}
SHORT = ("--sequence_length", "64", "--precision", "fp32", "--eval_max_sequences", "8", "--save_steps", "0")
BATCH = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "6")


@pytest.mark.parametrize(("family", "counts"), [("llama", (4, 1)), *((family, (1, 2, 2)) for family in FAMILIES)])
def test_gradients_are_those_of_the_whole_model_bit_for_bit(family: str, counts: tuple[int, ...]) -> None:
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1)
    found = self_check.split_in_small(self_check.small_copy(config, sum(counts)), counts)
    assert found.difference == 0
    assert bool(found.shared) is config.tie_word_embeddings and found.first and found.last


@pytest.mark.parametrize(("family", "way", "in_chunks"), [
    ("llama", "positions", True), ("gemma2", "positions", False), ("opt", "mask", True)])
def test_a_family_is_tried_in_small_before_it_is_split(family: str, way: Any, in_chunks: bool) -> None:
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1)
    found = self_check.check_family(config, 2, None)
    assert (found.way, found.in_chunks, found.in_tuple) == (way, in_chunks, False)


@pytest.mark.parametrize("wrong", [[Cut(0, 1, 3), Cut(2, 3, 3)], [Cut(0, 2, 3), Cut(1, 3, 3)]],
                         ids=["a dropped layer", "one twice"])
def test_planted_faults_are_refused(wrong: list[Cut], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "cuts", lambda counts: wrong)
    with pytest.raises(UserError, match="the gradients of llama are others"):
        self_check.check_family(AutoConfig.for_model("llama"), 2, None)


def test_layers_in_a_wrong_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(model: Any, cut: Cut, in_tuple: bool) -> None:
        layers = layers_of(model)
        layers[0], layers[1] = layers[1], layers[0]
        leave_out(model, cut, in_tuple)

    monkeypatch.setattr(self_check, "leave_out", swap)
    with pytest.raises(UserError, match="the gradients of llama are others"):
        self_check.check_family(AutoConfig.for_model("llama"), 2, None)


def test_a_family_that_cannot_be_tried_is_not_split() -> None:
    with pytest.raises(UserError, match="mamba2 can't be checked in small"):
        self_check.check_family(AutoConfig.for_model("mamba2"), 2, None)


def test_layers_are_shared_out_by_memory() -> None:
    assert shares(48, [24, 12]) == [32, 16] and shares(3, [80, 1, 1]) == [1, 1, 1]
    assert shares(6, [24, 24, 24]) == [2, 2, 2]
    assert choose_cuts((), 6, [2, 1], [None, None], None) == cuts([4, 2]) == [Cut(0, 4, 6), Cut(4, 6, 6)]


def test_layers_are_those_of_the_user_else_of_the_launchers_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    said: Any = SimpleNamespace(split_layers=())
    assert split_building.wanted_counts(said, 6, 2) == ()
    monkeypatch.setenv(PLANNED, "4,2")
    assert split_building.wanted_counts(said, 6, 2) == (4, 2)
    assert split_building.wanted_counts(said, 6, 3) == () == split_building.wanted_counts(said, 7, 2)  # fewer hosts now
    said.split_layers = (1, 5)
    assert split_building.wanted_counts(said, 6, 2) == (1, 5)


@pytest.mark.parametrize(("wanted", "layers", "memory", "line"), [
    ((), 2, [1, 1, 1], "2 layers can't be split over 3 ranks"),
    ((4, 4), 6, [2, 1], "4,4: 2 ranks share 6 layers, each at least one, as in 3,3"),
    ((1, 2, 3), 6, [1, 1], "1,2,3: 2 ranks share 6 layers")])
def test_impossible_cuts_are_wrong_usage(wanted: tuple[int, ...], layers: int, memory: list[int], line: str) -> None:
    with pytest.raises(UserError, match=line) as told:
        choose_cuts(wanted, layers, memory, [None] * len(memory), None)
    assert told.value.exit_code == 2


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A Llama with six layers, with an adapter to start from beside it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = own_tokenizer([path.read_text() for path in texts.glob("*.txt")], vocabulary=400)
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                  **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


def same_losses(one: Run, other: Run, within: float) -> None:
    assert one.losses() and one.losses().keys() == other.losses().keys()
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert one.losses(key) == pytest.approx(other.losses(key), abs=within), key
    assert [row.get("tokens") for row in one.metrics] == [row.get("tokens") for row in other.metrics]


@pytest.mark.slow
def test_it_trains_as_one_process_does_and_resumes_with_other_cuts(model: Path, train: Train) -> None:
    words = (*SHORT, *BATCH, "--max_grad_norm", "0.2", "--weight_decay", "0.1")
    start = train(*words, "--lora", "4", "--max_steps", "1", "--split_layers", "4,2", ranks=2, model=str(model),
                  name="start")
    assert "layers        4 + 2" in start.output and "6 sequences = 1 micro x 6 micro batches" in start.output
    adapter = ("--adapter", str(start.path / "model"))
    steps = ("--max_steps", "50", "--save_steps", "25", "--learning_rate", "1e-3")
    alone = train(*words, *adapter, *steps, model=str(model), name="alone")
    split = train(*words, *adapter, *steps, "--split_layers", "4,2", ranks=2, model=str(model), name="split")
    same_losses(alone, split, 1e-5)
    record = json.loads((split.path / "run.json").read_text())
    assert record["world_size"] == 2 and len(record["waiting"]["idle"]) == 2 and "  idle  " in split.output
    assert alone.output.count("parameters") and record["parameters"] == json.loads(
        (alone.path / "run.json").read_text())["parameters"]
    thirds = train(*words, *adapter, *steps, "--split_layers", "1,2,3", "--resume_from_checkpoint",
                   str(split.path / "checkpoints" / "checkpoint-25"), ranks=3, model=str(model), name="split")
    same_losses(alone, thirds, 1e-5)
    ids = AutoTokenizer.from_pretrained(model)("some words of a text", return_tensors="pt").input_ids
    from peft import AutoPeftModelForCausalLM

    with torch.no_grad():
        ours, theirs = (AutoPeftModelForCausalLM.from_pretrained(run.path / "model")(ids).logits
                        for run in (thirds, alone))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_it_trains_all_weights_as_one_process_does_and_resumes_with_other_cuts(model: Path, train: Train) -> None:
    words = (*SHORT, *BATCH, "--max_grad_norm", "0.2", "--weight_decay", "0.1", "--max_steps", "50", "--save_steps",
             "25", "--learning_rate", "1e-3")
    alone = train(*words, model=str(model), name="alone")
    split = train(*words, "--split_layers", "4,2", ranks=2, model=str(model), name="split")
    same_losses(alone, split, 1e-5)
    checkpoint = split.path / "checkpoints" / "checkpoint-25"
    states = [path.name for path in sorted(checkpoint.glob("*-of-*"))]
    assert states == [f"{what}-0000{number}-of-00002.safetensors" for what in ("model", "optimizer")
                      for number in (1, 2)]
    thirds = train(*words, "--split_layers", "1,2,3", "--resume_from_checkpoint", str(checkpoint), ranks=3,
                   model=str(model), name="split")
    same_losses(alone, thirds, 1e-5)
    assert (thirds.path / "model" / "model.safetensors.index.json").exists()
    models = [AutoModelForCausalLM.from_pretrained(run.path / "model").state_dict() for run in (alone, thirds)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][name], models[1][name], atol=1e-4) for name in models[0])
    # All parts of a checkpoint in one folder are a model.
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.architectures == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_the_best_checkpoint_of_all_stages_becomes_the_model(model: Path, train: Train) -> None:
    run = train(*SHORT, *BATCH, "--max_steps", "30", "--learning_rate", "0.1", "--warmup_steps", "0", "--eval_steps",
                "1", "--early_stopping", "2", "--split_layers", ranks=2, model=str(model))
    losses = run.losses("eval_loss")
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses)
    kept = run.path / "checkpoints" / f"checkpoint-{best}"
    found, wanted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (run.path / "model", kept))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_it_trains_in_bf16_with_checkpoints_of_activations(model: Path, train: Train) -> None:
    run = train("--sequence_length", "64", "--precision", "bf16", "--activation_checkpointing", "--lora", "4",
                "--max_steps", "20", "--learning_rate", "5e-3", *BATCH, "--split_layers", "--save_steps", "0", ranks=2,
                model=str(model))
    losses = run.losses()
    assert losses[20] < losses[1] - 0.2 and "layers        3 + 3" in run.output


def test_a_stage_reads_what_it_has_and_no_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    options: Any = SimpleNamespace(model_name_or_path=str(model), attn_implementation=None)
    config = AutoConfig.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model).state_dict()
    found: dict[str, torch.Tensor] = {}
    for cut in cuts([4, 1, 1]):
        stage = load_stage(options, config, cut, False, "float32", None)
        own = {name: weight for name, weight in stage.state_dict().items() if "norm.weight" not in name}
        assert not set(own) & set(found)
        found |= own
        assert sum(isinstance(layer, Elsewhere) for layer in layers_of(stage)) == 6 - (cut.end - cut.first)
    assert set(found) == {name for name in whole if "norm.weight" not in name}
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_a_host_needs_only_the_files_with_its_layers(model: Path) -> None:
    from types import SimpleNamespace

    options: Any = SimpleNamespace(model_name_or_path=str(model), attn_implementation=None)
    config = AutoConfig.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model).state_dict()
    places = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    others = other_shards(places, range(4))
    assert others and others == {file for file in places.values() if all(
        (layer_of(name) or 0) >= 4 for name, place in places.items() if place == file)}
    for file in others:
        (model / file).unlink()
    stage = load_stage(options, config, Cut(0, 4, 6), False, "float32", None)
    assert all(torch.equal(value, whole[name]) for name, value in stage.state_dict().items())
    with pytest.raises(UserError, match="isn't here, which has weights of layers 4 to 5: invoke sync --model"):
        load_stage(options, config, Cut(4, 6, 6), False, "float32", None)


@pytest.mark.parametrize(("words", "line"), [
    (["--split_layers", "--lora"], "needs two ranks or more"),
    (["--split_layers", "--lora", "--no_packing"], "can't be combined with --no_packing"),
    (["--split_layers", "--lora", "--deepspeed"], "takes the place of DeepSpeed's engine"),
    (["--split_layers", "--lora", "--precision", "fp16"], "--precision bf16"),
    (["--split_layers", "--lora", "--attn_implementation", "flash_attention_2"], "sdpa or eager"),
    (["--split_layers", "0,3", "--lora"], "write the layers of each rank, as in 32,16")])
def test_what_cannot_be_is_told_before_anything_is_loaded(words: list[str], line: str, train: Train) -> None:
    run = train(*words, expect=2)
    assert line in run.output
    assert run.output.count("\n") < 6


@pytest.mark.slow
def test_fewer_micro_batches_than_ranks_are_refused(model: Path, train: Train) -> None:
    run = train("--split_layers", "--lora", "--gradient_accumulation_steps", "1", ranks=2, model=str(model), expect=2)
    assert "1 micro batches can't keep 2 ranks busy: --gradient_accumulation_steps 8 or more" in run.output
