"""RAR against what the authors' code computed."""

import random

import pytest
import torch
from transformers import AutoModel, AutoProcessor, Trainer

from hf_argen import (
    AutoModelForImageGeneration,
    LlamaGenForImageGeneration,
    RarForImageGeneration,
    RarProcessor,
)
from hf_argen.generation.guidance import Guidance
from hf_argen.training import RandomnessAnnealing, training_arguments

from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import (
    PROMPTS,
    llamagen_config,
    llamagen_vq_config,
    maskgit_vq_config,
    rar_config,
    spread,
    text_encoder_config,
    text_tokenizer,
    tiny_rar,
    tokenizer_config,
)


@pytest.fixture(scope="module", params=["b_like", "nonsquare_mlp"])
def case(request):
    return golden("rar", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


@torch.no_grad()
def test_raster_pass(case, model):
    tensors = case.tensors
    ids, labels = tensors["tokens"], tensors["labels"]
    output = model(input_ids=ids, class_labels=labels, labels=ids)
    assert output.orders is None
    assert_close(output.logits, tensors["logits"][:, :-1])
    assert_close(output.loss, tensors["loss"])
    accuracy = (output.logits.argmax(-1) == ids).float().mean()
    assert_close(accuracy, tensors["accuracy"])
    for null in (-torch.ones_like(labels), torch.full_like(labels, model.config.num_classes)):
        assert_close(model(input_ids=ids, class_labels=null).logits, tensors["uncond_logits"][:, :-1])
    first = tensors["prefix_logits"].shape[1]
    assert_close(model(input_ids=ids[:, :first], class_labels=labels).logits, tensors["prefix_logits"])


@torch.no_grad()
def test_permuted_pass(case, model):
    tensors = case.tensors
    ids, orders = tensors["tokens"], tensors["orders"]
    inputs = {"input_ids": ids, "class_labels": tensors["labels"], "labels": ids, "orders": orders}
    output = model(**inputs, output_hidden_states=True)
    assert torch.equal(ids.gather(1, output.orders), tensors["perm_labels"])
    names = ["perm_input", *(f"perm_block_{i}" for i in range(model.config.num_hidden_layers))]
    for found, name in zip(output.hidden_states, names, strict=True):
        assert_close(found, tensors[name][:, :-1])  # the authors feed the last token, which predicts nothing
    assert_close(output.logits, tensors["perm_logits"][:, :-1])
    assert_close(output.loss, tensors["perm_loss"])
    condition = model.condition(tensors["labels"])
    positions = torch.arange(ids.shape[1] + 2)
    assert_close(condition.unsqueeze(1) + model.model.step_embedding(positions), tensors["perm_adaln"])


def test_drawn_orders_and_conditions(case):
    """With the authors' seeds, by Python's generator and torch's."""
    model, tensors = case.convert().train(), case.tensors
    seed = int(case.case["seeds"]["train_orders"].split()[-1])
    rows, tokens = tensors["train_orders"].shape
    model.set_randomness_ratio(0.5)
    random.seed(seed)
    torch.manual_seed(seed)
    assert torch.equal(model.sample_orders(rows, tokens, torch.device("cpu")), tensors["train_orders"])
    seed = int(case.case["seeds"]["train_condition"].split("(")[1].rstrip(")"))
    model.config.condition_dropout = 0.5
    count = len(tensors["train_condition"])
    labels = tensors["labels"].repeat(4)[:count]
    torch.manual_seed(seed)
    dropped = model.draw_dropped_conditions(count, torch.device("cpu"))
    null = tensors["train_condition"].max()
    expected = torch.where(dropped, null, labels + model.config.vocab_size + 1)
    assert torch.equal(expected, tensors["train_condition"])


def recipe_options(recipe, greedy=False):
    return {
        "guidance_scale": float(recipe["guidance_scale"]),
        "guidance_schedule": {"type": "power_cosine", "power": recipe["guidance_scale_pow"]},
        "temperature": recipe["randomize_temperature"],
        "do_sample": not greedy,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


def test_generation(case, model):
    tensors = case.tensors
    tokens = model.config.num_image_tokens
    for name, recipe in case.case["generation"].items():
        for generator in (torch.Generator(), None):
            (generator or torch).manual_seed(recipe["seed"])
            options = recipe_options(recipe, name == "greedy")
            output = model.generate(tensors["labels"], generator=generator, **options)
            assert torch.equal(output.sequences, tensors[f"{name}_tokens"]), name
            assert output.forward_calls == output.steps == tokens
        if name == "sampled":
            assert torch.equal(output.sequences, tensors["nocache_tokens"])
            probs = (output.logits / recipe["randomize_temperature"]).softmax(-1)
            assert_close(probs, tensors["sampled_probs"].transpose(0, 1))
        if name == "greedy":
            assert_close(output.logits, tensors["greedy_guided_logits"].transpose(0, 1))
            pictures = RarProcessor.postprocess(output.images)
            for picture, expected in zip(pictures, tensors["greedy_uint8"], strict=True):
                found = torch.tensor(list(picture.tobytes())).view(expected.shape)
                assert (found - expected).abs().max() <= 1
        if f"{name}_image" in tensors:
            assert_same_image(output.images, tensors[f"{name}_image"])


def test_guidance_strengths(case, model):
    tensors, recipe = case.tensors, case.case["generation"]["greedy"]
    config = model.generation_config
    config.guidance_scale = float(recipe["guidance_scale"])
    schedule = {"type": "power_cosine", "power": recipe["guidance_scale_pow"]}
    guidance, steps = model._guidance(config, schedule), model.config.num_image_tokens
    scales = torch.tensor([1 + guidance.strength(step, steps) for step in range(steps)])
    assert_close(scales, tensors["cfg_scales"], relative=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("fed", [1, 3, 5])
def test_windows_follow_their_positions(case, model, fed):
    """Several tokens a call, behind any number of others, give the logits of one pass."""
    tensors = case.tensors
    ids, condition = tensors["tokens"], model.condition(tensors["labels"])
    predictor = model.predictor_class(model, Guidance(0.0))
    predictor.reserve(ids.shape[1] + fed)
    logits = [predictor.prefill({"class_labels": tensors["labels"]})[:, None]]
    for start in range(0, ids.shape[1] - 1, fed):
        logits.append(predictor.predict(ids[:, start : min(start + fed, ids.shape[1] - 1)]))
        predictor.commit()
    assert_close(torch.cat(logits, dim=1), tensors["logits"][:, :-1])
    assert predictor._context["condition"].shape == condition.shape


# Training


def batch(model, size=4):
    generator = torch.Generator().manual_seed(0)
    shape = (size, model.config.num_image_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    return {"input_ids": ids, "labels": ids, "class_labels": torch.arange(size) % 3}


def test_training_mode_permutes():
    model = tiny_rar().train()
    inputs = batch(model)
    raster = torch.arange(16).expand(4, -1)
    assert torch.equal(model(**inputs).orders, raster)
    model.set_randomness_ratio(1.0)
    orders = model(**inputs).orders
    assert torch.equal(orders.sort(dim=1).values, raster) and not (orders == raster).all(dim=1).any()
    again = model.eval()(**inputs, orders=orders)
    assert torch.equal(model(**inputs, orders=raster).loss, model(**inputs).loss)
    assert not torch.equal(again.loss, model(**inputs).loss)
    assert model(**inputs).orders is None


def test_a_row_may_have_labels_that_do_not_count():
    model = tiny_rar()
    inputs = batch(model)
    orders = torch.stack([torch.randperm(16) for _ in range(4)])
    labels = inputs["labels"].clone()
    labels[:, 8:] = -100
    output = model(**{**inputs, "labels": labels}, orders=orders)
    counted = output.orders < 8
    expected = torch.nn.functional.cross_entropy(
        output.logits[counted], inputs["labels"].gather(1, orders)[counted]
    )
    assert_close(output.loss, expected)


def test_the_next_target_matters():
    """The same tokens before it, another place of the token to be predicted: another prediction."""
    model = tiny_rar()
    inputs = batch(model, size=1)
    first, second = torch.arange(16)[None], torch.arange(16)[None].clone()
    second[0, [8, 9]] = torch.tensor([9, 8])
    logits = [model(**inputs, orders=orders).logits[0] for orders in (first, second)]
    assert torch.equal(logits[0][:8], logits[1][:8])
    assert not torch.allclose(logits[0][8], logits[1][8], atol=1e-3)


def test_annealing_under_trainer(tmp_path):
    model = tiny_rar()
    rows = batch(model)
    rows = [{name: value[i] for name, value in rows.items()} for i in range(4)]
    seen = []

    class Watched(RandomnessAnnealing):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            super().on_step_begin(args, state, control, model=model, **kwargs)
            seen.append(model.randomness_ratio)

    options = {"max_steps": 7, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = training_arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=4, **options
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Watched(2, 6)]).train()
    assert seen == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    seen.clear()
    Trainer(tiny_rar(), arguments, train_dataset=rows, callbacks=[Watched(2, 6)]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert seen == [0.5, 0.25, 0.0]


def test_bad_annealing(tmp_path):
    with pytest.raises(ValueError, match="from step 5 to step 4"):
        RandomnessAnnealing(5, 4)
    for ratio in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"ratio is {ratio}; it must lie in \[0, 1\]"):
            tiny_rar().set_randomness_ratio(ratio)
    llamagen = LlamaGenForImageGeneration(llamagen_config())
    with pytest.raises(ValueError, match="LlamaGenForImageGeneration has no order of tokens"):
        RandomnessAnnealing(1, 2).on_step_begin(None, None, None, model=llamagen)


def test_a_new_model_is_the_identity_in_every_layer():
    model = RarForImageGeneration(rar_config()).eval()
    states = model(**batch(model), output_hidden_states=True).hidden_states
    assert all(torch.equal(state, states[0]) for state in states)


# By text


@pytest.fixture(scope="module")
def text_processor():
    return RarProcessor(tokenizer=text_tokenizer(), image_size=(8, 8))


@pytest.fixture(scope="module")
def text_model(text_processor):
    torch.manual_seed(1)
    encoder = text_encoder_config(len(text_processor.tokenizer))
    return spread(RarForImageGeneration(rar_config(condition_type="text", text_encoder_config=encoder)))


def test_pictures_follow_the_prompt(text_model, text_processor):
    options = {"guidance_scale": 3.0, "do_sample": False}
    ids = text_model.generate(**text_processor(PROMPTS), **options)
    assert ids.shape == (4, 16) and not torch.equal(ids[0], ids[1])
    alone = text_model.generate(**text_processor(PROMPTS[1]), **options)
    assert torch.equal(alone[0], ids[1])
    pooled = text_model.model.pool_text(**text_processor(PROMPTS))
    assert torch.equal(text_model.generate(prompt_embeds=pooled, **options), ids)
    null = text_model.model.null_text_embedding.weight.expand(2, -1)
    drawn = text_model.generate(num_return_sequences=2, do_sample=False)
    assert torch.equal(drawn, text_model.generate(prompt_embeds=null, do_sample=False))


def test_text_model_is_saved_with_its_processor(text_model, text_processor, tmp_path):
    text_model.save_pretrained(tmp_path)
    text_processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageGeneration.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    options = {"guidance_scale": 3.0, "do_sample": False}
    expected = text_model.generate(**text_processor(PROMPTS), **options)
    assert torch.equal(loaded.generate(**processor(PROMPTS), **options), expected)


def test_embeddings_from_outside():
    model = tiny_rar(condition_type="text", text_embed_dim=12)
    assert model.generate(prompt_embeds=torch.randn(3, 12), guidance_scale=2.0).shape == (3, 16)
    with pytest.raises(ValueError, match="draws from text"):
        model.generate([1])


# Tokenizers


def test_the_tokenizer_may_be_another_one(tmp_path):
    """A codebook of the same size on the same grid."""
    model = tiny_rar()
    other = AutoModel.from_config(llamagen_vq_config())
    ids = model.generate([1], do_sample=False)
    model.image_tokenizer = other
    assert model.config.image_tokenizer_config is other.config and other.config.grid_size == 4
    assert torch.equal(model.generate([1], do_sample=False), ids)
    model.save_pretrained(tmp_path)
    loaded = RarForImageGeneration.from_pretrained(tmp_path)
    assert type(loaded.image_tokenizer) is type(other)
    assert torch.equal(loaded.decode_images(ids), model.decode_images(ids))


@pytest.mark.parametrize(
    "config, message",
    [
        (maskgit_vq_config(codebook_size=8), "vocab_size is 16 in the model and 8"),
        (maskgit_vq_config(grid_size=[2, 8]), r"The token grid is \(4, 4\) in the model and \(2, 8\)"),
        (tokenizer_config(), "'multiscale_vq' has no single grid"),
    ],
)
def test_tokenizers_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_rar().image_tokenizer = AutoModel.from_config(config)


def test_bad_configurations():
    with pytest.raises(
        ValueError, match="is of type 'multiscale_vq'; this model takes tokenizers with one grid"
    ):
        rar_config(image_tokenizer_config=tokenizer_config())
    with pytest.raises(ValueError, match="hidden_size=30 is not a multiple of num_attention_heads=4"):
        rar_config(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"randomness_ratio is 2; it must lie in \[0, 1\]"):
        rar_config(randomness_ratio=2)
    with pytest.raises(ValueError, match="needs text_embed_dim or text_encoder_config"):
        rar_config(condition_type="text")


def test_bad_passes():
    model = tiny_rar()
    inputs = batch(model)
    bad = [
        ({"input_ids": torch.zeros(4, 17, dtype=torch.long)}, "pictures of this model have 16 tokens"),
        ({"labels": inputs["labels"][:, 1:]}, r"labels have the shape \(4, 15\); the ids have \(4, 16\)"),
        ({"orders": inputs["labels"][:2]}, r"orders have the shape \(2, 16\)"),
        ({"orders": torch.zeros(4, 16, dtype=torch.long)}, "orders must be permutations of 0 to 15"),
        ({"class_labels": torch.zeros(3, dtype=torch.long)}, "There are 3 conditions for 4 pictures"),
        ({"class_labels": torch.full((4,), 6)}, "class label 6 is out of range"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})
