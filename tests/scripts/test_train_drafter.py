"""The scripts that train a small language model and its drafters, on a few files."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_argen
from hf_argen import Eagle, MedusaHeads, SpeculativeDecoding

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
FUNCTION = '''
class Thing{0}:
    """{1}"""

    def count(self, values):
        total = 0
        for value in values:
            if value > {0}:
                total += value
            else:
                total -= 1
        print(total)
        return total
'''


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A little standard library of 60 modules that repeat themselves."""
    root = tmp_path_factory.mktemp("library")
    for i in range(60):
        text = FUNCTION.format(i, "What it counts. " * 30)
        (root / f"module{i}.py").write_text(text * 3)
    (root / "test").mkdir()
    (root / "test" / "never.py").write_text("x = 1")
    (root / "latin.txt").write_bytes(b"\xe9\xe8")
    return root


@pytest.fixture(scope="module")
def small(load_script, library, tmp_path_factory):
    """The trained model's folder, and the script."""
    script = load_script("train_small_lm")
    script.MODEL |= {**SIZES, "intermediate_size": 48}
    folder = tmp_path_factory.mktemp("small")
    short = "--vocab-size 300 --window 32 --max-steps 4 --save-steps 2 --batch-size 4 --eval-windows 4 --warmup-steps 1"
    options = script.parse(["--output", str(folder), "--prompts", "6", *short.split()])
    tokenizer = script.prepare(options, library)
    model = script.train(options, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return script, folder, options


def test_whole_modules_are_held_out(small, library):
    script, folder, _ = small
    found = script.texts(library)
    modules = [{module for module, _ in found[held_out]} for held_out in (True, False)]
    assert modules[0] and not modules[0] & modules[1]
    assert len(modules[0] | modules[1]) == 60
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    held_out = tokenizer.decode(np.load(folder / "held_out.npy").tolist())
    train = tokenizer.decode(np.load(folder / "train.npy").tolist())
    for module in modules[0]:
        name = f"Thing{module.removeprefix('module')}:"
        assert name in held_out and name not in train
    questions = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert {question["category"] for question in questions} == {"code", "documentation"}
    assert all(len(question["turns"]) == 1 for question in questions)
    assert [question["question_id"] for question in questions] == list(range(len(questions)))


def test_the_model_is_trained_and_goes_on(small, capsys):
    script, folder, options = small
    assert (folder / "training-model" / "checkpoint-4").is_dir()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    again = script.train(options, AutoTokenizer.from_pretrained(folder / "model"))  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "Held-out loss" in capsys.readouterr().out


def options_of(script, folder, method, output, *more):
    short = "--window 32 --windows 24 --batch-size 4 --save-steps 3 --warmup-steps 1"
    paths = ["--data", str(folder / "train.npy"), "--output", str(output)]
    return script.parse([str(folder / "model"), "--method", method, *paths, *short.split(), *more])


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_drafters_are_trained(small, load_script, method, tmp_path):
    """The loss falls, a killed run ends like one that was not, and the drafter drafts for its model."""
    _, folder, _ = small
    script = load_script("train_drafter")
    whole = script.train(options_of(script, folder, method, tmp_path / "whole", "--max-steps", "6"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "training" / "checkpoint-6")
    resumed = script.train(options_of(script, folder, method, tmp_path / "killed", "--max-steps", "6"))
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name
    whole.save_pretrained(tmp_path / "drafter")
    network = (Eagle if method == "eagle" else MedusaHeads).from_pretrained(tmp_path / "drafter")
    target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.from_numpy(np.load(folder / "held_out.npy")[:20].astype(np.int64))[None]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        hf_argen.generate(
            target, SpeculativeDecoding(network), input_ids=ids, max_new_tokens=12, do_sample=False
        ),
        plain,
    )


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_what_is_learnt(small, load_script, method, tmp_path):
    _, folder, _ = small
    script = load_script("train_drafter")
    losses = []
    for steps in ("1", "30"):
        options = options_of(
            script, folder, method, tmp_path / steps, "--max-steps", steps, "--learning-rate", "3e-3"
        )
        model = script.train(options).eval()
        target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        states = script.HiddenStates(tmp_path / steps / "hidden-states", cached_ids(folder), 32)
        batch = [script.Features(states, range(24))[i] for i in range(24)]
        hidden, ids = (torch.stack([one[name] for one in batch]) for name in ("hidden_states", "labels"))
        with torch.no_grad():
            if method == "medusa":
                losses.append(float(model(hidden, labels=ids).loss))
            else:
                drafted = model(hidden[:, :-1], inputs_embeds=target.get_input_embeddings()(ids[:, 1:]))
                losses.append(float((drafted.last_hidden_state - hidden[:, 1:]).abs().mean()))
    assert losses[1] < 0.9 * losses[0]


def cached_ids(folder):
    return np.load(folder / "train.npy")[: 24 * 32].astype(np.int64).reshape(24, 32)


def test_hidden_states_go_on_where_they_were(small, load_script, tmp_path):
    _, folder, _ = small
    script = load_script("train_drafter")
    target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = cached_ids(folder)
    whole = script.HiddenStates(tmp_path / "whole", ids, 32)
    whole.compute(target, 5)
    part = script.HiddenStates(tmp_path / "part", ids, 32)
    part.states[:8] = whole.states[:8]
    part._write(8)
    again = script.HiddenStates(tmp_path / "part", ids, 32)
    assert again.done == 8
    again.compute(target, 5)
    assert np.allclose(whole.states, again.states, atol=2e-3) and again.done == 24
    with torch.no_grad():
        expected = target(torch.from_numpy(ids[-1:]), output_hidden_states=True).hidden_states[-1]
    assert np.allclose(again.states[-1], expected[0].numpy(), atol=1e-2)
    with pytest.raises(ValueError, match=r"holds hidden states of the shape \[24, 32, 32\]"):
        script.HiddenStates(tmp_path / "part", ids[:3], 32)


def test_bad_data(small, load_script, tmp_path):
    _, folder, _ = small
    script = load_script("train_drafter")
    np.save(tmp_path / "few.npy", np.zeros(9, dtype=np.int64))
    np.save(tmp_path / "foreign.npy", np.full(99, 9999))
    options = argparse.Namespace(**vars(options_of(script, folder, "eagle", tmp_path / "out")))
    for name, message in (("few", "9 tokens; two windows of 32"), ("foreign", "the token 9999")):
        options.data = [str(tmp_path / f"{name}.npy")]
        with pytest.raises(ValueError, match=message):
            script.train(options)
    text = tmp_path / "words.txt"
    text.write_text("def count(self, values):")
    ids = script.read_ids([str(text)], str(folder / "model"))
    assert AutoTokenizer.from_pretrained(folder / "model").decode(ids.tolist()).startswith("def count(self")
