"""VAR's teacher-forced pass and training against what the authors' code computed."""

import pytest
import torch
import torch.nn.functional as F

from hf_argen import VarForImageGeneration
from hf_argen.modeling.var.convert_var import TRANSFORMER

from ..helpers.goldens import assert_close, golden
from ..helpers.tiny import var_config

CASES = ["d2_adaln_l2_q4", "d3_saln_l2_q0", "d2_adaln_nol2_q1"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden("var", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


@torch.no_grad()
def test_teacher_forced_pass(case, model):
    tensors = case.tensors
    ids, labels = tensors["tok.ids"], tensors["tf.labels_effective"]
    output = model(input_ids=ids, class_labels=labels, labels=ids, output_hidden_states=True)
    assert_close(output.hidden_states[0], tensors["tf.embed"])
    for i, hidden_states in enumerate(output.hidden_states[1:]):
        assert_close(hidden_states, tensors[f"tf.block{i}"])
    assert_close(output.logits, tensors["tf.logits"])
    assert_close(output.loss.view(1), tensors["tf.loss"])
    per_token = F.cross_entropy(output.logits.transpose(1, 2), ids, reduction="none")
    assert_close(per_token, tensors["tf.loss_tokens"])
    model.config.label_smoothing = 0.1
    smoothed = model(pixel_values=tensors["tok.image"], class_labels=labels).loss
    model.config.label_smoothing = 0.0
    assert_close(smoothed.view(1), tensors["tf.loss_ls0.1"])


@torch.no_grad()
def test_generated_tokens_teacher_forced(case, model):
    """One pass over generated ids has the states of the scale-by-scale generation, of both guidance halves."""
    tensors = case.tensors
    ids = tensors["greedy.ids"]
    assert_close(model.image_tokenizer.quantizer.scale_inputs(ids), tensors["greedy.next_inputs"])
    labels = torch.cat([tensors["tf.labels"], torch.full_like(tensors["tf.labels"], -1)])
    output = model(input_ids=ids.repeat(2, 1), class_labels=labels, output_hidden_states=True)
    assert_close(output.hidden_states[0], tensors["greedy.block0_in"])
    assert_close(output.hidden_states[-1], tensors["greedy.last_block"])


@torch.no_grad()
def test_condition_is_dropped_in_eval_only_on_demand(case, model):
    """The authors drop labels in evaluation mode too; ours is a switch, and the draws are theirs."""
    tensors, ids = case.tensors, case.tensors["tok.ids"]
    plain = model(input_ids=ids, class_labels=tensors["tf.labels"]).logits
    model.config.condition_dropout_in_eval = True
    torch.manual_seed(case.case["seeds"]["tf_seed"])
    is_dropped = tensors["tf.rand"] < model.config.condition_dropout
    assert torch.equal(
        tensors["tf.labels"].masked_fill(is_dropped, model.config.num_classes), tensors["tf.labels_effective"]
    )
    dropped = model(input_ids=ids, class_labels=tensors["tf.labels"]).logits
    model.config.condition_dropout_in_eval = False
    assert_close(dropped, tensors["tf.logits"])
    differs = not torch.equal(tensors["tf.labels"], tensors["tf.labels_effective"])
    assert torch.allclose(plain, dropped) != differs


@torch.no_grad()
def test_pass_over_the_first_scales(case, model):
    """Fine-tuning on the coarse scales runs only their tokens."""
    lengths = model.config.scale_lengths
    ids, labels = case.tensors["tok.ids"], case.tensors["tf.labels_effective"]
    for stop in range(1, len(lengths) + 1):
        count = sum(lengths[:stop])
        logits = model(input_ids=ids[:, :count], class_labels=labels).logits
        assert_close(logits, case.tensors["tf.logits"][:, :count])


def test_training_step_is_the_authors():
    """Loss, gradients, gradient norm and one optimiser step of the authors' trainer, with its label dropping."""
    case = golden("var", "trainer_ckpt_one_step")
    model = case.convert("tokenizer", "transformer").train()
    model.config.label_smoothing = 0.1
    tensors = case.tensors
    weights = [p for p in model.parameters() if p.requires_grad]
    assert torch.equal(model.encode_images(tensors["image"]), tensors["ids"])
    assert_close(model.image_tokenizer.quantizer.scale_inputs(tensors["ids"]), tensors["var_input"])
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    torch.manual_seed(case.case["seeds"]["step"])
    output = model(pixel_values=tensors["image"], class_labels=tensors["labels"])
    assert_close(output.logits, tensors["logits"])
    assert_close(output.loss.view(1), tensors["loss"])
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, 1e9)
    assert_close(norm.view(1), tensors["grad_norm"])
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("image_tokenizer.")}
    keys = case.convert("transformer", "tokenizer").state_dict().keys()
    gradients = TRANSFORMER.narrowed(_original_keys(case)).revert(
        {name: p.grad for name, p in trained.items()}
    )
    for name in (name for name in tensors if name.startswith("grad.")):
        assert_close(gradients[name.removeprefix("grad.")], tensors[name])
    assert keys == model.state_dict().keys()

    torch.nn.utils.clip_grad_norm_(weights, 2.0)
    optimizer.step()
    after = TRANSFORMER.narrowed(_original_keys(case)).revert(dict(trained))
    for name in (name for name in tensors if name.startswith("after.") and name.endswith("weight")):
        assert_close(after[name.removeprefix("after.")], tensors[name])


@torch.no_grad()
def test_trainer_checkpoint():
    """A user-trained model is nested in the trainer's file, tokenizer included."""
    case = golden("var", "trainer_ckpt_one_step")
    model, tensors = case.convert("trainer"), case.tensors
    model.config.condition_dropout_in_eval = True
    torch.manual_seed(case.case["seeds"]["step"])
    assert_close(
        model(input_ids=tensors["ids"], class_labels=tensors["labels"]).logits, tensors["after.logits"]
    )
    ids = model.generate(tensors["labels"], guidance_scale=2.0, do_sample=False)
    assert torch.equal(ids, tensors["after.greedy_ids"])


def _original_keys(case):
    return torch.load(case.path / "var_d2.pth", weights_only=True).keys()


def test_a_new_model_starts_as_the_authors_does():
    """Residual branches small, gates near zero, the head near uniform (`init_weights` of their code)."""
    config = var_config()
    model = VarForImageGeneration(config)
    std, depth = (3 * config.hidden_size) ** -0.5, 2 * config.num_hidden_layers
    layer = model.model.layers[0]
    gates, others = layer.modulation.linear.weight.split([64, 128])
    for weight, expected in (
        (layer.self_attn.q_proj.weight, std),
        (layer.self_attn.o_proj.weight, std / depth**0.5),
        (layer.mlp.fc2.weight, std / depth**0.5),
        (gates, 1e-5 * std),
        (others, 0.5 * std),
        (model.model.norm.linear.weight, 0.5 * std),
        (model.head.out_proj.weight, 0.02 * std),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.15)
    assert torch.allclose(layer.self_attn.logit_scale, torch.tensor(4.0).log())
