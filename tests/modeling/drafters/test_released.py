"""Medusa and EAGLE against the authors' code: what the networks compute, the trees, and how far drafts are accepted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import hf_argen
from hf_argen import (
    Chain,
    DynamicTree,
    Eagle,
    EagleConfig,
    ExactMatch,
    IndependentSequences,
    MedusaHeads,
    OptTree,
    SpecTr,
    SpeculativeDecoding,
    StaticTree,
    TypicalAcceptance,
)
from hf_argen.generation.sampling import TorchRandomness, randomness
from hf_argen.modeling.drafters import drafting

from ...helpers.goldens import assert_close, golden, states_equal
from ...helpers.language_models import language_model, prompts

EAGLES = ["eagle1_static_a", "eagle2_a", "eagle3_a"]


def load(case, role):
    folder = case.path / (case.case["convert"]["files"].get(role) or case.case["convert"]["files"]["model"])
    if role == "target":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return (Eagle if case.family in ("eagle", "opt_tree") else MedusaHeads).from_pretrained(folder)


def generate(model, decoding, prompt, steps, **options):
    """What the authors' loop gives: its steps without cutting; tokens and how many each step added."""
    output = hf_argen.generate(
        model,
        decoding,
        input_ids=prompt,
        max_new_tokens=150,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    lengths = output.accept_lengths[0, :steps].tolist()
    return output.sequences[0, prompt.shape[1] :].tolist(), lengths


# Medusa


@pytest.fixture(scope="module", params=["medusa1_a", "medusa2_a"])
def medusa(request):
    case = golden("medusa", request.param)
    return case, load(case, "target"), load(case, "heads")


def test_heads_as_recorded(medusa):
    case, target, heads = medusa
    tensors = case.tensors
    with torch.no_grad():
        output = target(tensors["forward/input_ids"], output_hidden_states=True)
        assert_close(output.hidden_states[-1], tensors["forward/last_hidden"])
        assert_close(heads(output.hidden_states[-1]).logits, tensors["forward/medusa_logits"])
    assert heads.config.medusa_num_heads == case.case["medusa_num_heads"]


def test_medusa_generates_as_recorded(medusa):
    """Greedy and typical: the same tokens, and every step accepts as many."""
    case, target, heads = medusa
    tensors, tree = case.tensors, StaticTree(case.case["medusa_choices"], draw=False)
    runs = {"greedy": (None, {})}
    for i, setting in enumerate(case.case["typical"]):
        rule = TypicalAcceptance(setting["posterior_threshold"], setting["posterior_alpha"])
        runs[f"typical{i}"] = (rule, {"do_sample": True, "temperature": setting["temperature"], "top_k": 0})
    for name, (rule, options) in runs.items():
        recorded = tensors[f"{name}/accept_length"].tolist()
        if rule is not None:  # the authors' first token is the best one, too
            first = target(tensors["prompt_ids"]).logits[0, -1].argmax()
            options = {**options, "logits_processor": [OnlyFirst(tensors["prompt_ids"].shape[1], first)]}
        tokens, lengths = generate(
            target, SpeculativeDecoding(heads, tree, rule), tensors["prompt_ids"], len(recorded), **options
        )
        assert lengths == [length + 1 for length in recorded], name
        new = tensors[f"{name}/new_ids"].tolist()
        assert tokens[: len(new)] == new, name


class OnlyFirst:
    """A logits processor that fixes the token after the prompt."""

    def __init__(self, length, token):
        self.length, self.token = length, token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, self.token, 0.0)


# EAGLE


@pytest.fixture(scope="module", params=EAGLES)
def eagle(request):
    case = golden("eagle", request.param)
    return case, load(case, "target"), load(case, "draft")


def embeds_of(network, target, ids):
    return (network.embed_tokens or target.get_input_embeddings())(ids)


def test_eagle_computes_as_recorded(eagle):
    case, target, network = eagle
    tensors = case.tensors
    features = tensors.get("forward/draft_hidden_in", tensors["forward/target_last_hidden"][:, :-1])
    ids = tensors["forward/draft_ids_in"]
    with torch.no_grad():
        output = network(features, inputs_embeds=embeds_of(network, target, ids))
        assert_close(output.last_hidden_state, tensors["forward/draft_hidden_out"])
        logits = target.lm_head(output.last_hidden_state) if output.logits is None else output.logits
        assert_close(logits, tensors["forward/draft_logits"])
        hidden = target(tensors["forward/input_ids"], output_hidden_states=True).hidden_states
    if network.config.version == 3:
        layers = (2, len(target.model.layers) // 2, len(target.model.layers) - 3)
        assert_close(torch.cat([hidden[i] for i in layers], -1), tensors["forward/target_concat_hidden"])


def shape_of(case):
    if "tree_choices" in case.case:
        return StaticTree(case.case["tree_choices"])
    return DynamicTree(**{name: case.case["settings"][name] for name in ("total_token", "depth", "top_k")})


def test_eagle_generates_as_recorded(eagle):
    case, target, network = eagle
    tensors = case.tensors
    recorded = tensors["greedy/accept_length"].tolist()
    prompt = tensors["prompt_ids"]
    tokens, lengths = generate(target, SpeculativeDecoding(network, shape_of(case)), prompt, len(recorded))
    assert lengths == [length + 1 for length in recorded]
    new = tensors["greedy/output_ids"][0, prompt.shape[1] :].tolist()
    assert tokens[: len(new)] == new


class At(StoppingCriteria):
    """Stops at a length; the authors' loop ends with a step, whose last token it leaves out."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Replayed(TorchRandomness):
    """The uniform numbers and choices that the authors' sampler drew, in their order."""

    def __init__(self, uniforms, tokens):
        self.uniforms, self.tokens = iter(uniforms.tolist()), iter(tokens.tolist())

    def bernoulli(self, probs, generator):
        return torch.tensor([next(self.uniforms) <= probs.item()])

    def categorical(self, probs, generator):
        token = next(self.tokens)
        assert probs.flatten()[token] > 0
        return torch.full(probs.shape[:-1], token)


@pytest.mark.parametrize("name", ["eagle2_a", "eagle3_a"])
def test_eagle_samples_as_recorded(name):
    """Every draw replayed: the same candidates are tried with the same chances, so the same tokens come out."""
    case = golden("eagle", name)
    target, network = load(case, "target"), load(case, "draft")
    tensors, prompt = case.tensors, case.tensors["prompt_ids"]
    for i, setting in enumerate(case.case["sampling"]):
        recorded = tensors[f"sample{i}/accept_length"].tolist()
        new = tensors[f"sample{i}/output_ids"][0, prompt.shape[1] :].tolist()
        source = Replayed(tensors[f"sample{i}/python_random"], tensors[f"sample{i}/multinomial_token"])
        options = {"temperature": setting["temperature"], "top_k": setting["top_k"]}
        if setting["top_p"]:
            options["top_p"] = setting["top_p"]
        with randomness(source):
            output = hf_argen.generate(
                target,
                SpeculativeDecoding(network, shape_of(case)),
                input_ids=prompt,
                max_new_tokens=150,
                stopping_criteria=StoppingCriteriaList([At(prompt.shape[1] + len(new))]),
                do_sample=True,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                **options,
            )
        assert output.sequences[0, prompt.shape[1] :].tolist() == new
        lengths = output.accept_lengths[0].tolist()
        assert lengths[:-1] == [length + 1 for length in recorded][: len(lengths) - 1]


class ReplayedTrials(TorchRandomness):
    """Torch draws as it did for the authors, from the same seed; whether a draft stays, Python drew."""

    def __init__(self, uniforms):
        self.uniforms = iter(uniforms.tolist())

    def bernoulli(self, probs, generator):
        return torch.tensor([next(self.uniforms) <= probs.item()])


def test_drafts_drawn_without_replacement_as_recorded():
    """EAGLE's first version draws the children of every node, and compares with what they were drawn from."""
    case = golden("eagle", "eagle1_static_a")
    target, network = load(case, "target"), load(case, "draft")
    tensors, prompt, setting = case.tensors, case.tensors["prompt_ids"], case.case["sampling"][0]
    recorded = tensors["sample0/accept_length"].tolist()
    new = tensors["sample0/output_ids"][0, prompt.shape[1] :].tolist()
    assert setting["temperature"] == 1.0  # with another one the authors forget it where nothing was rejected
    with randomness(ReplayedTrials(tensors["sample0/python_random"])):
        torch.manual_seed(setting["seed"])
        output = hf_argen.generate(
            target,
            SpeculativeDecoding(network, shape_of(case)),
            input_ids=prompt,
            max_new_tokens=150,
            stopping_criteria=StoppingCriteriaList([At(prompt.shape[1] + len(new))]),
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    assert output.sequences[0, prompt.shape[1] :].tolist() == new
    lengths = output.accept_lengths[0].tolist()
    assert lengths[:-1] == [length + 1 for length in recorded][: len(lengths) - 1]


@pytest.mark.parametrize("name", ["classic_a", "eagle_a"])
def test_opt_tree_generates_as_recorded(name):
    """Greedy and, from the same seed, sampled: the same tokens, and every step accepts as many."""
    case = golden("opt_tree", name)
    target = load(case, "target")
    network = (
        load(case, "draft")
        if name == "eagle_a"
        else AutoModelForCausalLM.from_pretrained(case.path / "draft")
    )
    prompt = case.tensors["prompt_ids"]
    for run, spec in case.case["runs"].items():
        recorded = case.tensors[f"{run}/accept_length"].tolist()
        new = case.tensors[f"{run}/output_ids"][0, prompt.shape[1] :].tolist()
        options = {}
        if spec["temperature"]:
            options = {"do_sample": True, "temperature": spec["temperature"], "top_k": spec.get("top_k", 0)}
        torch.manual_seed(spec.get("seed", 0))
        decoding = SpeculativeDecoding(network, OptTree(**spec["tree"]), ExactMatch())
        tokens, lengths = generate(target, decoding, prompt, len(recorded), **options)
        assert tokens[: len(new)] == new, run
        assert lengths == [length + 1 for length in recorded], run


# In the engine


@pytest.fixture(scope="module")
def drafters():
    """A Llama of 7 layers and untrained drafters for it."""
    target = language_model("llama", num_hidden_layers=7)
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 40}
    third = {"version": 3, "draft_vocab_size": 24, "num_key_value_heads": 2, "has_embedding": False}
    eagle3 = Eagle(Eagle.config_class(**config, **third))
    eagle3.d2t.copy_(torch.arange(24) // 2)
    heads = MedusaHeads(MedusaHeads.config_class(hidden_size=32, vocab_size=40, medusa_num_heads=3))
    return target, {
        "medusa": heads.eval(),
        "eagle": Eagle(Eagle.config_class(**config)).eval(),
        "eagle3": eagle3.eval(),
    }


SHAPES = [None, Chain(3), IndependentSequences(2, 3), OptTree(6, 0.01, 4)]


@pytest.mark.parametrize("name", ["medusa", "eagle", "eagle3"])
def test_greedy_tokens(drafters, name):
    """Padded batches, guidance and processors; a drafter changes nothing."""
    target, networks = drafters
    for options in ({}, {"guidance_scale": 1.5, "repetition_penalty": 1.2}):
        inputs = {**prompts(4), "max_new_tokens": 9, "do_sample": False, **options}
        expected = target.generate(**inputs)
        for tree in SHAPES:
            decoding = SpeculativeDecoding(networks[name], tree)
            assert torch.equal(hf_argen.generate(target, decoding, **inputs), expected)
    static = hf_argen.generate(target, decoding, **inputs, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("name", ["medusa", "eagle", "eagle3"])
def test_a_batch_drafts_as_its_rows(drafters, name):
    """Padding, unequal rows and the batch do not change what is drafted: every row accepts as it does alone."""
    target, networks = drafters
    decoding = SpeculativeDecoding(networks[name], Chain(2))
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    inputs = prompts(3)
    together = hf_argen.generate(target, decoding, **inputs, **options)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row : row + 1, -length:]
        alone = hf_argen.generate(target, decoding, input_ids=ids, **options)
        steps = alone.accept_lengths.shape[1]
        assert together.accept_lengths[row, :steps].tolist() == alone.accept_lengths[0].tolist()


def test_samples(drafters):
    target, networks = drafters
    for network in networks.values():
        for tree, rule in (
            (None, None),
            (StaticTree([[0], [1], [0, 0]]), None),
            (IndependentSequences(2, 2), SpecTr()),
        ):
            output = hf_argen.generate(
                target,
                SpeculativeDecoding(network, tree, rule),
                **prompts(),
                max_new_tokens=6,
                do_sample=True,
                top_k=8,
            )
            assert output.shape[1] <= 13


@pytest.mark.parametrize("name", ["medusa", "eagle", "eagle3"])
def test_saved_and_stored(drafters, name, tmp_path):
    target, networks = drafters
    network = networks[name]
    network.save_pretrained(tmp_path / "drafter")
    again = type(network).from_pretrained(tmp_path / "drafter")
    state = network.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    stored = SpeculativeDecoding(again).to_dict()
    kind = "medusa_drafter" if name == "medusa" else "eagle_drafter"
    assert stored == json.loads(json.dumps(stored))
    assert stored["drafter"] == {"type": kind, "model": str(tmp_path / "drafter")}
    inputs = {**prompts(), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(hf_argen.generate(target, stored, **inputs), target.generate(**inputs))


# Bad input


def test_drafters_of_another_model(drafters):
    _, networks = drafters
    small = language_model("llama", num_hidden_layers=2)
    other = language_model("llama", hidden_size=16, num_hidden_layers=7)
    words = language_model("llama", vocab_size=50, num_hidden_layers=7)
    for name, model, message in (
        (
            "medusa",
            other,
            "made for hidden states of size 32, but LlamaForCausalLM has 16: it belongs to another",
        ),
        ("eagle", words, "made for a vocabulary of 40, but LlamaForCausalLM has 50"),
        ("eagle3", small, "needs at least 7; this one has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_argen.generate(model, SpeculativeDecoding(networks[name]), **prompts(), max_new_tokens=3)
    with pytest.raises(ValueError, match="no embeddings of its own; give inputs_embeds"):
        networks["eagle3"](torch.zeros(1, 2, 96), input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_which_layers_eagle3_reads():
    """Those that its configuration names, on models too small for the authors' choice, too; none that are not there."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 40}
    config = EagleConfig(version=3, feature_layers=[0, 1, -1], **sizes)
    assert EagleConfig.from_dict(config.to_dict()).feature_layers == [0, 1, -1]
    torch.manual_seed(0)
    network = Eagle(config).eval()
    small = language_model("llama", num_hidden_layers=2)
    inputs = prompts(1)
    plain = small.generate(**inputs, max_new_tokens=6, do_sample=False)
    seen = []
    network.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoding = SpeculativeDecoding(network, Chain(2))
    assert torch.equal(hf_argen.generate(small, decoding, **inputs, max_new_tokens=6), plain)
    states = small(**inputs, output_hidden_states=True).hidden_states
    assert torch.allclose(seen[0], torch.cat([states[0], states[1], states[2]], dim=-1), atol=1e-5)
    network.config.feature_layers = [0, 1, 3]
    with pytest.raises(
        ValueError, match=r"reads the hidden states \[0, 1, 3\], but the language model has 2"
    ):
        hf_argen.generate(small, decoding, **inputs, max_new_tokens=6)
    for version, layers in ((1, [0, 1, 2]), (3, [0, 1])):
        with pytest.raises(ValueError, match="version 3 reads three layers"):
            EagleConfig(version=version, feature_layers=layers, **sizes)


def test_a_head_of_another_base_model_of_the_same_size(drafters, monkeypatch):
    """Sizes cannot tell; the name that it was trained for can."""
    target, networks = drafters
    said = []
    monkeypatch.setattr(drafting.logger, "warning_once", said.append)
    config = networks["medusa"].config
    monkeypatch.setattr(config, "base_model_name_or_path", "lmsys/vicuna-7b-v1.3")
    for name in ("", "models/vicuna-7b-v1.3", "models/llama-2-7b"):
        monkeypatch.setattr(target, "name_or_path", name)
        hf_argen.generate(
            target, SpeculativeDecoding(networks["medusa"], Chain(1)), **prompts(1), max_new_tokens=2
        )
    assert len(said) >= 1 and all(
        "trained for 'lmsys/vicuna-7b-v1.3'; with 'models/llama-2-7b'" in one for one in said
    )


def test_damaged_releases(tmp_path):
    case = golden("medusa", "medusa1_a")
    folder = shutil.copytree(case.path / "medusa", tmp_path / "heads", copy_function=shutil.copyfile)
    weights = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    for change, message in (
        (lambda state: state.pop("1.0.linear.bias"), "heads.1.block.linear.bias is missing, it should be"),
        (
            lambda state: state.update({"9.strange": torch.zeros(1)}),
            "a weight 9.strange, which no Medusa head has",
        ),
        (lambda state: state.update({"0.1.weight": torch.zeros(7, 64)}), "does not fit MedusaHeads"),
    ):
        state = dict(weights)
        change(state)
        torch.save(state, folder / "medusa_lm_head.pt")
        with pytest.raises(ValueError, match=message):
            MedusaHeads.from_pretrained(folder)
    (folder / "medusa_lm_head.pt").unlink()
    with pytest.raises(
        ValueError, match=r"holds no Medusa heads: neither medusa_lm_head.pt nor weights named"
    ):
        MedusaHeads.from_pretrained(folder)
    with pytest.raises(ValueError, match="holds no EAGLE drafter"):
        Eagle.from_pretrained(case.path / "target")
    with pytest.raises(ValueError, match="it has no config"):
        Eagle.from_pretrained(tmp_path)


def test_layers_of_a_head_that_are_one_block(tmp_path):
    """Of more layers the file repeats one block; where they differ they cannot be it."""
    case = golden("medusa", "medusa1_a")
    folder = shutil.copytree(case.path / "medusa", tmp_path / "heads", copy_function=shutil.copyfile)
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    deep = {key.replace(".1.weight", ".2.weight"): value for key, value in state.items()}
    for head in range(5):
        for name in ("weight", "bias"):
            deep[f"{head}.1.linear.{name}"] = deep[f"{head}.0.linear.{name}"].clone()
    torch.save(deep, folder / "medusa_lm_head.pt")
    heads = MedusaHeads.from_pretrained(folder)
    assert heads.config.medusa_num_layers == 2
    hidden = torch.randn(1, 2, 64)
    block = heads.heads[0].block
    assert torch.equal(heads(hidden).logits[0], heads.heads[0].lm_head(block(block(hidden))))
    deep["0.1.linear.bias"] += 1
    torch.save(deep, folder / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"0.1.linear.bias .* differs from the other layers of its head"):
        MedusaHeads.from_pretrained(folder)


def test_eagle_flags(tmp_path):
    """What released configurations and weights may differ in: biases, a wider target, a scaled or other rotation."""
    case = golden("eagle", "eagle3_a")
    folder = shutil.copytree(case.path / "draft", tmp_path / "draft", copy_function=shutil.copyfile)
    fields = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()

    def network(changes, **weights):
        (folder / "config.json").write_text(json.dumps({**fields, **changes}))
        save_file({**state, **weights}, folder / "model.safetensors")
        return Eagle.from_pretrained(folder)

    wide = network(
        {"target_hidden_size": 64, "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        **{"fc.weight": torch.randn(48, 192), "embed_tokens.weight": torch.randn(160, 48)},
    )
    assert wide.config.has_embedding and wide.config.rope_theta == 5e5 and wide.config.rope_factor == 2.0
    assert wide(torch.randn(1, 3, 192), input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)
    with pytest.raises(ValueError, match="scales its rotary positions by 'yarn'"):
        network({"rope_scaling": {"type": "yarn", "factor": 2.0}})
    biases = {
        f"midlayer.self_attn.{name}_proj.bias": torch.zeros(
            len(state[f"midlayer.self_attn.{name}_proj.weight"])
        )
        for name in "qkv"
    }
    assert network({}, **biases).config.attention_bias
    whole = network({"draft_vocab_size": 160}, **{"lm_head.weight": torch.randn(160, 48)})
    assert whole.draft_ids is None
    assert load_file(folder / "model.safetensors")


# The Hub


@pytest.mark.parametrize("name", ["eagle3_a", "medusa2_a"])
def test_from_the_hub(hub, name):
    """What the authors released is fetched file by file; ours is pushed and comes back."""
    family, role = ("eagle", "draft") if name == "eagle3_a" else ("medusa", "model")
    case = golden(family, name)
    files = {path.name: path.read_bytes() for path in (case.path / role).iterdir()}
    hub.add("authors/released", files)
    network_class = Eagle if family == "eagle" else MedusaHeads
    network = network_class.from_pretrained("authors/released")
    local = network_class.from_pretrained(case.path / role)
    assert states_equal(network, local)
    assert network.name_or_path == "authors/released"
    network.push_to_hub("tester/drafter")
    assert states_equal(network_class.from_pretrained("tester/drafter"), network)
    with pytest.raises(ValueError, match=r"'authors/none' .*cannot be"):
        network_class.from_pretrained("authors/none")
