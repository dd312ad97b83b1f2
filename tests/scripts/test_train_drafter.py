"""The scripts that train a small language model and its drafters, on a few files."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_argen
from hf_argen import Eagle, EagleConfig, MedusaHeads, SpeculativeDecoding

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
    model, _ = script.train(options, tokenizer)
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


def test_the_model_is_trained_and_goes_on(small):
    script, folder, options = small
    assert (folder / "training-model" / "checkpoint-4").is_dir()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    again, loss = script.train(
        options, AutoTokenizer.from_pretrained(folder / "model")
    )  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    held_out = json.loads((folder / "held_out.json").read_text())
    card = script.model_card(again.num_parameters(), loss, ", ".join(held_out))
    assert f"{loss:.3f} nats" in card and all(module in card for module in held_out)


def options_of(script, folder, method, output, *more):
    short = "--window 32 --windows 24 --batch-size 4 --save-steps 3 --warmup-steps 1"
    paths = ["--data", str(folder / "train.npy"), "--output", str(output)]
    return script.parse(
        [str(folder / "model"), "--method", method.split()[-1], *paths, *short.split(), *more]
    )


METHODS = {
    "medusa": [],
    "eagle": ["--steps", "2"],
    "eagle3": ["--steps", "2", "--feature-layers", "0", "1", "1", "--draft-vocab", "120", "--speculators"],
    "narrow eagle3": ["--steps", "2", "--feature-layers", "0", "1", "-1", "--hidden-size", "16"],
}


@pytest.mark.parametrize("method", METHODS)
def test_drafters_are_trained(small, load_script, method, tmp_path, capsys):
    """A killed run ends like one that was not, says how many drafts are right, and the drafter drafts for its model."""
    _, folder, _ = small
    script = load_script("train_drafter")
    more = ("--max-steps", "6", *METHODS[method])
    whole = script.train(options_of(script, folder, method, tmp_path / "whole", *more))
    assert "Held-out drafts that are right" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "training" / "checkpoint-6")
    resumed = script.train(options_of(script, folder, method, tmp_path / "killed", *more))
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name
    whole.save_pretrained(tmp_path / "drafter")
    if method == "eagle3":
        written = Eagle.from_pretrained(tmp_path / "whole" / "speculators")
        assert written.config.feature_layers == [0, 1, 1]
        assert torch.equal(written.draft_ids, whole.draft_ids) and len(set(whole.draft_ids.tolist())) == 120
        with pytest.raises(SystemExit):
            script.parse(["model", "--method", "eagle", "--data", "x", "--output", "y", "--speculators"])
    if method.startswith("narrow"):
        assert whole.config.hidden_size == 16 and whole.embed_tokens.weight.requires_grad
    network = (MedusaHeads if method == "medusa" else Eagle).from_pretrained(tmp_path / "drafter")
    target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.from_numpy(np.load(folder / "held_out.npy")[:20].astype(np.int64))[None]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        hf_argen.generate(
            target, SpeculativeDecoding(network), input_ids=ids, max_new_tokens=12, do_sample=False
        ),
        plain,
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_is_learnt(small, load_script, method, tmp_path, capsys):
    """More of the held-out drafts are right after training than before."""
    _, folder, _ = small
    script = load_script("train_drafter")
    shares = []
    for steps, rate in (("1", "1e-9"), ("40", "5e-3")):
        more = ("--max-steps", steps, "--learning-rate", rate, *METHODS[method])
        script.train(options_of(script, folder, method, tmp_path / steps, *more))
        line = capsys.readouterr().out.split("right, the first, the second, ...: ")[1].splitlines()[0]
        shares.append([float(share) for share in line.split(", ")])
    assert all(0 <= share <= 1 for both in shares for share in both)
    assert sum(shares[1]) > sum(shares[0])


@pytest.mark.parametrize("width", ["32", "7", "0"])
def test_a_width_that_cannot_be(small, load_script, width, tmp_path):
    _, folder, _ = small
    script = load_script("train_drafter")
    options = options_of(
        script, folder, "eagle3", tmp_path, "--feature-layers", "0", "1", "1", "--hidden-size", width
    )
    if width == "32":  # the language model's own is none
        target = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert not script.new_eagle(target, options, np.zeros((1, 4), np.int64)).config.has_embedding
        return
    with pytest.raises(ValueError, match=f"--hidden-size is {width}; it must be below"):
        script.train(options)


def test_a_narrow_drafter_begins_with_the_language_models_distances(load_script):
    script = load_script("train_drafter")
    torch.manual_seed(0)
    weight = torch.randn(20, 4) @ torch.randn(4, 16)  # four directions hold all of it
    assert torch.allclose(
        torch.cdist(script.main_components(weight, 4), script.main_components(weight, 4)),
        torch.cdist(weight, weight),
        atol=1e-3,
    )


def test_the_steps_of_training_are_those_of_drafting(load_script):
    """
    What EAGLE sees on its own second and third step is what it sees when it drafts: the features of the language model
    up to a place, and its own after it.
    """
    script = load_script("drafter_training")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30}
    for version, width in ((1, 16), (3, 48)):
        eagle = Eagle(EagleConfig(version=version, **sizes, initializer_range=0.3)).eval()
        features, embeds = torch.randn(1, 7, width), torch.randn(1, 7, 16)
        with torch.no_grad():
            steps = list(script.unrolled(eagle, features, embeds, 3))
            for place in (3, 5):  # the last of the language model's features
                cache = DynamicCache()
                known = eagle(
                    features[:, : place + 1],
                    inputs_embeds=embeds[:, : place + 1],
                    attention_mask=script.unrolled_mask(place + 1, 0, embeds),
                    past_key_values=cache,
                ).last_hidden_state[:, -1:]
                assert torch.allclose(steps[0][:, place], known[:, 0], atol=1e-5)
                for step in (1, 2):
                    if place + step == 7:
                        break
                    known = eagle(
                        known,
                        inputs_embeds=embeds[:, place + step : place + step + 1],
                        position_ids=torch.tensor([[place + step]]),
                        past_key_values=cache,
                    ).last_hidden_state
                    assert torch.allclose(steps[step][:, place + step], known[:, 0], atol=1e-5)


def test_the_model_writes_windows(small, load_script, tmp_path):
    """The continuations are the model's own, and a killed run goes on."""
    _, folder, _ = small
    script = load_script("train_drafter")
    more = ("--generate", "10", "--prompt", "12", "--generate-batch-size", "4", "--max-steps", "1")
    options = options_of(script, folder, "eagle", tmp_path, *more)
    target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    windows, held_out = script.read_windows(target, options)
    assert windows.shape == (24 - 1 + 10, 32) and held_out == [32]
    ids = torch.from_numpy(windows[-3:])
    with torch.no_grad():
        assert torch.equal(target(ids).logits[:, 11:-1].argmax(dim=-1), ids[:, 12:])
    state = tmp_path / "generated" / "done.json"
    state.write_text(state.read_text().replace('"done": 10', '"done": 8'))
    again, _ = script.read_windows(target, options)
    assert np.array_equal(again, windows)
    options.prompt = 13
    with pytest.raises(ValueError, match="generated windows of the prompt tokens 12, this run has 13"):
        script.read_windows(target, options)
    options.prompt = 32
    with pytest.raises(ValueError, match="--prompt is 32; it must be at least 1 and below --window, 32"):
        script.read_windows(target, options)


def cached_ids(folder):
    return np.load(folder / "train.npy")[: 24 * 32].astype(np.int64).reshape(24, 32)


def test_hidden_states_go_on_where_they_were(small, load_script, tmp_path):
    _, folder, _ = small
    script = load_script("train_drafter")
    target = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = cached_ids(folder)
    whole = script.HiddenStates(tmp_path / "whole", ids, 64, (1, -1))
    whole.compute_from(target, 5)
    part = script.HiddenStates(tmp_path / "part", ids, 64, (1, -1))
    part.rows[:8] = whole.rows[:8]
    part.finish(8)
    again = script.HiddenStates(tmp_path / "part", ids, 64, (1, -1))
    assert again.done == 8
    again.compute_from(target, 5)
    assert np.allclose(whole.rows, again.rows, atol=2e-3) and again.done == 24
    with torch.no_grad():
        states = target(torch.from_numpy(ids[-1:]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[1], states[-1]], dim=-1)
    assert np.allclose(again.rows[-1], expected[0].numpy(), atol=1e-2)
    with pytest.raises(ValueError, match=r"holds hidden states of the shape \[24, 32, 64\]"):
        script.HiddenStates(tmp_path / "part", ids[:3], 64, (1, -1))
    with pytest.raises(ValueError, match=r"of the layers \[1, -1\], this run has \[0, -1\]"):
        script.HiddenStates(tmp_path / "part", ids, 64, (0, -1))


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
