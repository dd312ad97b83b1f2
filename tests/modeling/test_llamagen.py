"""LlamaGen against what the authors' code computed."""

import json

import pytest
import torch

from hf_argen import LlamaGenForImageGeneration, LlamaGenVQModel, convert_original
from hf_argen.modeling.llamagen.convert_llamagen import CONVERTER, TRANSFORMER
from hf_argen.modeling.llamagen.modeling_llamagen import words_last

from ..helpers.goldens import SHARED, assert_close, assert_same_image, golden
from ..helpers.tiny import llamagen_config


def converted(case):
    """The model of a case with the tokenizer that its pictures were decoded with, if there were any."""
    name = case.case.get("tokenizer")
    if name is None:
        return case.convert()
    tokenizer = golden("llamagen", name.rsplit("/", 1)[1])
    config = {**case.original_config(), **tokenizer.original_config()}
    return convert_original("llamagen", {**case.files(), **tokenizer.files()}, config)


@pytest.fixture(scope="module", params=["c2i_ddp", "c2i_fsdp_flat"])
def case(request):
    return golden("llamagen", request.param)


@pytest.fixture(scope="module")
def model(case):
    return converted(case)


@torch.no_grad()
def test_teacher_forced_pass(case, model):
    tensors = case.tensors
    ids, labels = tensors["tokens"], tensors["labels"]
    output = model(input_ids=ids, class_labels=labels, output_hidden_states=True)
    for layer in range(model.config.num_hidden_layers):
        assert_close(output.hidden_states[layer + 1], tensors[f"tf_hidden_block{layer}"])
    assert_close(output.logits, tensors["tf_logits"])
    assert_close(
        model(input_ids=ids, class_labels=-torch.ones_like(labels)).logits, tensors["tf_logits_null"]
    )
    null = torch.full_like(labels, model.config.num_classes)
    assert_close(model(input_ids=ids, class_labels=null).logits, tensors["tf_logits_null"])


def gradient_norms(model, case):
    trained = {
        name: p.grad for name, p in model.named_parameters() if not name.startswith("image_tokenizer.")
    }
    gradients = TRANSFORMER.revert(trained)
    return torch.stack([gradients[name].norm() for name in case.case["train_grad_norms_order"]])


def test_training(case):
    model, tensors = converted(case).train(), case.tensors
    torch.manual_seed(case.case["train_seed"])
    output = model(input_ids=tensors["tokens"], class_labels=tensors["labels"], labels=tensors["tokens"])
    assert_close(output.logits, tensors["train_logits"])
    assert_close(output.loss, tensors["train_loss"])
    output.loss.backward()
    assert_close(gradient_norms(model, case), tensors["train_grad_norms"])
    torch.manual_seed(case.case["train_seed"])
    inputs = {"input_ids": tensors["tokens"], "class_labels": tensors["labels"], "labels": tensors["tokens"]}
    assert_close(model(**inputs, valid=tensors["train_valid"]).loss, tensors["train_loss_valid"])


def options_of(recipe):
    options = {
        "guidance_scale": recipe["cfg_scale"],
        "temperature": recipe["temperature"],
        "top_k": recipe["top_k"],
        "top_p": recipe["top_p"],
        "do_sample": recipe["sample_logits"],
        "generator": torch.Generator().manual_seed(recipe["seed"]),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if recipe.get("cfg_interval", -1) > -1:
        options["guidance_schedule"] = {"type": "interval", "stop": recipe["cfg_interval"] + 2}
    return options


def check(case, name, output):
    expected = case.tensors
    assert torch.equal(output.sequences, expected[f"{name}_ids"])
    assert_close(output.logits, expected[f"{name}_logits"])
    if f"{name}_image" in expected:
        assert_same_image(output.images, expected[f"{name}_image"].clamp(-1, 1).add(1).mul(0.5))


def test_generation(case, model):
    for name, recipe in case.case["generation"].items():
        output = model.generate(case.tensors["labels"], **options_of(recipe))
        check(case, name, output)
        assert output.forward_calls == output.steps == model.config.num_image_tokens


# By caption


@pytest.fixture(scope="module")
def text_case():
    return golden("llamagen", "t2i")


@pytest.fixture(scope="module")
def text_model(text_case):
    return converted(text_case)


def captions(case, kind="left"):
    """Embeddings and mask of a form that the authors' scripts make."""
    tensors = case.tensors
    if kind == "right":
        mask = tensors["t5_mask"]
        return {"prompt_embeds": tensors["t5_embeds"] * mask[..., None], "prompt_attention_mask": mask}
    mask = tensors["mask_left"] if kind == "left" else torch.ones_like(tensors["mask_left"])
    return {"prompt_embeds": tensors["cond_left"], "prompt_attention_mask": mask}


@torch.no_grad()
def test_captioned_pass(text_case, text_model):
    tensors = text_case.tensors
    embeds, mask = words_last(tensors["t5_embeds"], tensors["t5_mask"], 120)
    assert torch.equal(embeds, tensors["cond_left"]) and torch.equal(mask, tensors["mask_left"])
    assert_close(text_model.condition(**captions(text_case)).embeds, tensors["cap_proj"])
    output = text_model(input_ids=tensors["tokens"], **captions(text_case), output_hidden_states=True)
    assert_close(output.logits, tensors["tf_logits"])
    for layer in range(3):
        assert_close(output.hidden_states[layer + 1][:, 119:], tensors[f"tf_hidden_block{layer}"])
    plain = text_model(input_ids=tensors["tokens"], **captions(text_case, "nomask"))
    assert_close(plain.logits, tensors["tf_logits_plain_causal"])


def test_captioned_training(text_case):
    model, tensors = converted(text_case).train(), text_case.tensors
    torch.manual_seed(text_case.case["train_seed"])
    ids = tensors["tokens"]
    output = model(input_ids=ids, labels=ids, valid=tensors["train_valid"], **captions(text_case))
    assert_close(output.logits, tensors["train_logits"])
    assert_close(output.loss, tensors["train_loss"])
    output.loss.backward()
    assert_close(gradient_norms(model, text_case), tensors["train_grad_norms"])


def test_captioned_generation(text_case, text_model):
    for name, recipe in text_case.case["generation"].items():
        output = text_model.generate(**captions(text_case, recipe["cond"]), **options_of(recipe))
        check(text_case, name, output)


@torch.no_grad()
def test_short_captions_are_padded(text_case, text_model):
    full = captions(text_case)
    short = {name: value[:, -40:] for name, value in full.items()}
    options = {"guidance_scale": 7.5, "do_sample": False}
    assert torch.equal(text_model.generate(**short, **options), text_model.generate(**full, **options))


def test_bad_captions(text_case, text_model):
    full = captions(text_case)
    embeds, mask = full["prompt_embeds"], full["prompt_attention_mask"]
    bad = [
        (
            {"prompt_embeds": embeds[..., :-1], "prompt_attention_mask": mask},
            r"takes \(batch, up to 120, 20\)",
        ),
        ({"prompt_embeds": torch.cat([embeds, embeds], 1), "prompt_attention_mask": mask}, "up to 120"),
        ({"prompt_embeds": embeds}, "without prompt_attention_mask; give it"),
        ({"prompt_embeds": embeds, "prompt_attention_mask": mask[:, 1:]}, r"must be \(2, 120\)"),
        ({"prompt_ids": torch.ones(1, 4, dtype=torch.long)}, "no text encoder; give prompt_embeds"),
    ]
    for inputs, message in bad:
        with pytest.raises(ValueError, match=message):
            text_model.generate(**inputs)


def test_bad_requests(model):
    tokens = model.config.num_image_tokens
    with pytest.raises(ValueError, match=rf"must lie in \[1, {tokens}\]"):
        model.generate([0], max_new_tokens=tokens + 1)
    with pytest.raises(ValueError, match="is out of range; this model has the classes 0 to"):
        model.generate([model.config.num_classes + 1])
    with pytest.raises(ValueError, match=r"cannot be decoded by 'next_scale'; it can by .*next_token"):
        model.generate([0], decoding="next_scale")
    with pytest.raises(ValueError, match=rf"pictures of this model have {tokens} tokens"):
        model(input_ids=torch.zeros(1, tokens + 1, dtype=torch.long), class_labels=torch.zeros(1).long())


@torch.no_grad()
def test_a_new_model_is_uniform():
    model = LlamaGenForImageGeneration(llamagen_config()).eval()
    logits = model(
        input_ids=torch.zeros(1, 16, dtype=torch.long), class_labels=torch.zeros(1, dtype=torch.long)
    ).logits
    assert not logits.any()


# Forms of checkpoints


@torch.no_grad()
def test_heads_and_grid_of_a_stray_table():
    """The flat file of the large models tells what the weights do not."""
    case = golden("llamagen", "c2i_fsdp_flat")
    model = case.convert(with_config=False)
    assert (model.config.num_attention_heads, model.config.grid_size, model.config.num_classes) == (2, 3, 6)
    assert_close(
        model(input_ids=case.tensors["tokens"], class_labels=case.tensors["labels"]).logits,
        case.tensors["tf_logits"],
    )


def test_heads_have_to_be_told():
    with pytest.raises(ValueError, match=r"48 wide.*give their number.*\['n_head'\]"):
        golden("llamagen", "c2i_ddp").convert(with_config=False)


def test_other_nestings(tmp_path):
    case = golden("llamagen", "c2i_ddp")
    weights = torch.load(case.path / "c2i_tiny.pt", weights_only=True)["model"]
    weights["layers.0.attention.kv_cache.k_cache"] = torch.zeros(2)
    expected = case.convert().state_dict()
    forms = [
        (weights, "transformer"),
        ({"module": weights}, "transformer"),
        ({"state_dict": weights, "steps": 3}, "transformer"),
        ({"model": {}, "ema": weights}, "transformer_ema"),
    ]
    for i, (content, role) in enumerate(forms):
        file = tmp_path / f"{i}.pt"
        torch.save(content, file)
        found = convert_original("llamagen", {role: file}, case.original_config()).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 4}, "says n_layer=4, but the weights say 3"),
        ({"multiple_of": 100}, "says multiple_of=100"),
        ({"block_size": 15}, "must be a square number"),
        ({"model_type": "t2i"}, "says model_type=t2i, but the weights say c2i"),
        ({"n_kv_head": 2}, "says n_kv_head=2, but the weights say 4"),
        ({"class_dropout_prob": 0.0}, "says num_classes=10, but the weights say 11"),
        ({"depth": 4}, "unknown argument 'depth'"),
    ],
)
def test_contradictions(change, message):
    case = golden("llamagen", "c2i_ddp")
    config = {"transformer": {**case.original_config()["transformer"], **change}}
    with pytest.raises(ValueError, match=message):
        convert_original("llamagen", case.files(), config)


def test_no_null_class(tmp_path):
    case = golden("llamagen", "c2i_ddp")
    weights = torch.load(case.path / "c2i_tiny.pt", weights_only=True)["model"]
    weights["cls_embedding.embedding_table.weight"] = weights["cls_embedding.embedding_table.weight"][:10]
    torch.save(weights, tmp_path / "no_null.pt")
    config = {"transformer": {**case.original_config()["transformer"], "class_dropout_prob": 0.0}}
    model = convert_original("llamagen", {"transformer": tmp_path / "no_null.pt"}, config)
    assert model.config.num_classes == 10 and not model.config.has_null_class
    first = {"guidance_scale": 1.0, "do_sample": False}
    assert torch.equal(model.generate([3], **first), case.convert().generate([3], **first))
    with pytest.raises(ValueError, match="without null class"):
        model.generate([3], guidance_scale=2.0)


def released() -> dict:
    path = SHARED / "llamagen" / "released_state_dicts.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("name", released())
def test_released_sizes(name):
    """The keys and shapes of every released file fill the model that its preset describes."""
    entries = released()[name]["entries"]
    weights = {}
    for entry in entries:
        keys = [entry["key"]] if "key" in entry else []
        for index in entry.get("indices", []):
            parts = entry["pattern"].split("{i}")
            numbers = index if isinstance(index, list) else [index]
            keys.append(parts[0] + "".join(str(n) + part for n, part in zip(numbers, parts[1:], strict=True)))
        for key in keys:
            weights[key] = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
    role = "tokenizer" if name.startswith("VQ") else "transformer"
    assert not CONVERTER.roles[role].unknown(weights)
    plan = CONVERTER.plan({role: weights}, {})
    assert plan.model_class is (LlamaGenVQModel if role == "tokenizer" else LlamaGenForImageGeneration)
    with torch.device("meta"):
        expected = plan.model_class(plan.config).state_dict()
    found = plan.key_maps[role].apply(weights)
    assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
