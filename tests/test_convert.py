"""`convert_original` on the reference checkpoints, and everything that it refuses."""

import argparse
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from hf_argen import CodeForImageGeneration, MultiScaleVQModel, VarForImageGeneration, convert_original
from hf_argen.modeling.checkpoints import ConversionError

from .helpers.goldens import golden, states_equal

GROUPS = {"tokenizer": {"norm_num_groups": 4}}


@pytest.fixture(scope="module")
def reference():
    return golden("var", "d2_adaln_l2_q4")


@pytest.fixture
def files(reference):
    return reference.files("tokenizer", "transformer")


@pytest.fixture
def edited(reference, tmp_path):
    """Writes a changed copy of one of the reference files and returns all files."""

    def edit(role, change):
        files = reference.files("tokenizer", "transformer")
        weights = torch.load(files[role], weights_only=True)
        change(weights)
        files[role] = tmp_path / f"{role}.pth"
        torch.save(weights, files[role])
        return files

    return edit


# What is inferred


@pytest.mark.parametrize(
    "case, groups, heads",
    [("d2_adaln_l2_q4", 4, None), ("d3_saln_l2_q0", 2, None), ("d2_adaln_nol2_q1", 4, 2)],
)
def test_partial_original_config_gives_the_same_model(case, groups, heads):
    reference = golden("var", case)
    full = reference.convert("tokenizer", "transformer")
    partial = {"tokenizer": {"norm_num_groups": groups}, "transformer": {"num_heads": heads} if heads else {}}
    inferred = convert_original("var", reference.files("tokenizer", "transformer"), partial)
    assert states_equal(full, inferred)
    expected, found = full.config.to_dict(), inferred.config.to_dict()
    not_in_the_weights = ("drop_path_rate", "condition_dropout")
    assert {k for k in expected if expected[k] != found[k]} <= set(not_in_the_weights)


def test_every_option_of_the_constructors_arrives(reference, files):
    transformer = {
        "norm_eps": 1e-5,
        "drop_rate": 0.1,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "cond_drop_rate": 0.4,
    }
    tokenizer = {"norm_num_groups": 2, "dropout": 0.1, "using_znorm": True, "beta": 0.5, "quant_resi": -0.25}
    config = convert_original("var", files, {"transformer": transformer, "tokenizer": tokenizer}).config
    assert (config.layer_norm_eps, config.hidden_dropout, config.attention_dropout) == (1e-5, 0.1, 0.2)
    assert (config.drop_path_rate, config.condition_dropout) == (0.3, 0.4)
    vq = config.image_tokenizer_config
    assert (vq.norm_num_groups, vq.dropout, vq.normalize_codes) == (2, 0.1, True)
    assert (vq.commitment_loss_weight, vq.residual_conv_ratio) == (0.5, 0.25)


def test_arguments_of_the_authors_hub_class(reference, files):
    """Its constructor takes the tokenizer's arguments within its own; those given for the tokenizer win."""
    arguments = reference.original_config()
    nested = {**arguments["tokenizer"], "beta": 0.5, "norm_num_groups": 2}
    transformer = {**arguments["transformer"], "vae_kwargs": nested}
    vq = convert_original("var", files, {"transformer": transformer, **GROUPS}).config.image_tokenizer_config
    assert (vq.commitment_loss_weight, vq.norm_num_groups) == (0.5, 4)


def test_folder_of_the_authors_hub_class(reference, files, tmp_path):
    """Weights and constructor arguments in one folder, in which other files may lie; arguments given come first."""
    arguments = reference.original_config()
    nested = {**arguments["tokenizer"], "beta": 0.5}
    save_file(torch.load(files["transformer"], weights_only=True), tmp_path / "model.safetensors")
    save_file({"tok.image": torch.zeros(1)}, tmp_path / "expected.safetensors")
    stored = {**arguments["transformer"], "cond_drop_rate": 0.3, "norm_eps": 1e-5, "vae_kwargs": nested}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    files["transformer"] = tmp_path
    given = {"transformer": {"norm_eps": 1e-4}}
    config = convert_original("var", files, given).config
    assert (config.condition_dropout, config.layer_norm_eps) == (0.3, 1e-4)
    assert config.image_tokenizer_config.commitment_loss_weight == 0.5
    (tmp_path / "config.json").write_text("{")
    refuses(files, r"config\.json' of the transformer is not JSON")


@pytest.mark.parametrize(
    "case, number, ratio",
    [("d2_adaln_l2_q4", 4, 0.5), ("d2_adaln_nol2_q1", 1, 0.5), ("d3_saln_l2_q0", 4, 0.5)],
)
def test_residual_convolutions_of_every_sharing(case, number, ratio):
    tokenizer = golden("var", case).convert("tokenizer")
    assert (tokenizer.config.num_residual_convs, tokenizer.config.residual_conv_ratio) == (number, ratio)


def test_no_residual_convolutions(edited):
    def remove(weights):
        for key in [key for key in weights if "quant_resi" in key]:
            del weights[key]

    model = convert_original("var", edited("tokenizer", remove), GROUPS)
    config = model.image_tokenizer.config
    assert (config.num_residual_convs, config.residual_conv_ratio) == (0, 0.0)
    with pytest.raises(ConversionError, match=r"quant_resi=0\.5, but the weights say there are no residual"):
        convert_original(
            "var", edited("tokenizer", remove), {"tokenizer": {"norm_num_groups": 4, "quant_resi": 0.5}}
        )


@pytest.mark.parametrize("change", ["missing", "other number of scales"])
def test_hit_statistics_that_do_not_fit_are_emptied(edited, change):
    def replace(weights):
        hits = weights.pop("quantize.ema_vocab_hit_SV")
        if change != "missing":
            weights["quantize.ema_vocab_hit_SV"] = torch.ones(7, hits.shape[1])

    usage = convert_original("var", edited("tokenizer", replace), GROUPS).image_tokenizer.quantizer.code_usage
    assert usage.shape == (5, 96) and not usage.any()


def test_non_square_scales_can_be_given(edited):
    def two_by_three(weights):  # the scale of 3x3 tokens becomes one of 2x3: three tokens fewer
        weights["lvl_1L"] = torch.cat(
            [weights["lvl_1L"][:, :5], torch.full((1, 6), 2), weights["lvl_1L"][:, 14:]], 1
        )
        weights["pos_1LC"] = weights["pos_1LC"][:, 3:].clone()
        del weights["attn_bias_for_masking"]

    files = edited("transformer", two_by_three)
    scales = [1, 2, [2, 3], 4, 5]
    model = convert_original("var", files, {**GROUPS, "transformer": {"patch_nums": scales}})
    assert model.config.patch_nums == model.image_tokenizer.config.patch_nums == scales
    with pytest.raises(ConversionError, match=r"\[1, 4, 6, 16, 25\] tokens, which are not all squares"):
        convert_original("var", files, GROUPS)


def test_generation_config_is_the_authors_default(reference):
    config = reference.convert().generation_config
    assert (config.do_sample, config.guidance_scale, config.top_k, config.top_p) == (True, 1.5, 0, 1.0)
    assert getattr(config, "decoding", None) is None
    code = golden("code", "d3_to_d2_s3").convert().generation_config
    assert code.decoding["type"] == "collaborative_next_scale"


def test_nothing_aliases_the_file_or_stays_on_the_meta_device(reference, files):
    model = convert_original("var", files, GROUPS)
    assert not model.training
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert len(storages) == len(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not states_equal(model, convert_original("var", files, GROUPS))


def test_model_survives_saving(reference, tmp_path):
    model = reference.convert()
    model.save_pretrained(tmp_path)
    assert states_equal(model, VarForImageGeneration.from_pretrained(tmp_path))


# Forms of files


def test_safetensors_and_half_precision(reference, files, tmp_path):
    weights = torch.load(files["transformer"], weights_only=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(halves, tmp_path / "transformer.safetensors")
    model = convert_original("var", {**files, "transformer": tmp_path / "transformer.safetensors"}, GROUPS)
    assert model.model.layers[0].mlp.fc1.weight.dtype == torch.float16
    assert model.image_tokenizer.quant_conv.weight.dtype == torch.float32


def test_a_file_of_mixed_dtypes_takes_the_widest(edited):
    def mix(weights):
        weights["head.weight"] = weights["head.weight"].half()

    model = convert_original("var", edited("transformer", mix), GROUPS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_alone(reference):
    alone = reference.convert("tokenizer")
    assert type(alone) is MultiScaleVQModel
    assert states_equal(alone, reference.convert().image_tokenizer)
    config = {"tokenizer": reference.original_config()["tokenizer"]}
    assert states_equal(alone, convert_original("multiscale_vq", reference.files("tokenizer"), config))


def test_non_square_tokenizer_case():
    model = golden("var", "tok_ch8_q4_rect").convert()
    assert type(model) is MultiScaleVQModel and model.config.patch_nums == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def trained():
    return golden("var", "trainer_ckpt_one_step")


def test_trainer_checkpoint(trained):
    nested = torch.load(trained.files("trainer")["trainer"], weights_only=True)["trainer"]
    model = trained.convert("trainer")
    assert torch.equal(model.head.out_proj.weight, nested["var_wo_ddp"]["head.weight"])
    assert torch.equal(model.image_tokenizer.quant_conv.weight, nested["vae_local"]["quant_conv.weight"])
    assert states_equal(model, trained.convert("tokenizer", "trainer"))


def test_explicit_roles_take_precedence_over_the_trainer_checkpoint(trained):
    start = trained.convert("tokenizer", "transformer")
    assert states_equal(trained.convert("tokenizer", "transformer", "trainer"), start)
    assert not states_equal(trained.convert("trainer"), start)


def test_trainer_checkpoint_with_pickled_arguments(trained, tmp_path):
    content = torch.load(trained.files("trainer")["trainer"], weights_only=True)
    torch.save({**content, "args": argparse.Namespace(**content["args"])}, tmp_path / "ar-ckpt-last.pth")
    files = {"trainer": tmp_path / "ar-ckpt-last.pth"}
    assert states_equal(convert_original("var", files, trained.original_config()), trained.convert("trainer"))


def test_trainer_checkpoint_without_its_entries(trained, tmp_path):
    torch.save({"trainer": {"var_wo_ddp": {"a": torch.ones(1)}}}, tmp_path / "t.pth")
    with pytest.raises(ConversionError, match="foreign keys a"):
        convert_original("var", {"trainer": tmp_path / "t.pth"})
    torch.save({"epoch": 1}, tmp_path / "t.pth")
    with pytest.raises(ConversionError, match=r"trainer file .* has no entry trainer; its entries are epoch"):
        convert_original("var", {"trainer": tmp_path / "t.pth"})
    with pytest.raises(ConversionError, match="role that reads nested checkpoints"):
        convert_original("var", {"transformer": trained.files("trainer")["trainer"]})


def test_code_takes_drafter_refiner_and_tokenizer():
    reference = golden("code", "d3_to_d2_s3")
    model = reference.convert()
    assert type(model) is CodeForImageGeneration
    for role, inside in (("drafter", model), ("refiner", model.refiner)):
        theirs = torch.load(reference.files(role)[role], weights_only=True)
        assert torch.equal(inside.head.out_proj.weight, theirs["head.weight"])
        assert torch.equal(inside.model.position_embedding, theirs["pos_1LC"])
    for role in ("tokenizer", "drafter", "refiner"):
        others = [other for other in ("tokenizer", "drafter", "refiner") if other != role]
        with pytest.raises(ConversionError, match=f"role '{role}' is missing"):
            reference.convert(*others)


def test_code_refuses_models_of_different_scales_or_codes():
    reference, other = golden("code", "d3_to_d2_s3"), golden("var", "d3_saln_l2_q0")
    files = {**reference.files(), "refiner": other.files("transformer")["transformer"]}
    with pytest.raises(
        ConversionError, match=r"drafter has patch_nums \[1, 2, 3, 4, 5\], the refiner \[1, 2, 3, 4\]"
    ):
        convert_original("code", files, GROUPS)


# Bad input


def refuses(files, match, config=GROUPS, family="var"):
    with pytest.raises(ConversionError, match=match):
        convert_original(family, files, config)


def test_unknown_family_and_preset(files):
    refuses(
        files,
        r"Unknown family 'vra' \(did you mean 'var' or 'rar'\?\); there are multiscale_vq, var, code",
        family="vra",
    )
    refuses("var-d17", "var has no preset 'var-d17' .*var-d16", config=None)
    refuses("var-d16", "brings its own original_config")
    refuses("code-9", "it has none", config=None, family="multiscale_vq")


def test_unknown_and_missing_roles(files, reference):
    refuses(
        {**files, "tokeniser": "x"},
        r"Unknown role 'tokeniser' \(did you mean 'tokenizer'\?\); the roles of var",
    )
    refuses(files, "Unknown role 'drafter'", config={"drafter": {}})
    refuses({}, "No files given; the roles of var are transformer, tokenizer")
    refuses(reference.files("transformer"), "role 'tokenizer' is missing: .* vae_ch160v4096z32.pth")


def test_checkpoint_of_another_family(files):
    llamagen = golden("llamagen", "c2i_fsdp_flat")
    (foreign,) = llamagen.files("transformer").values()
    refuses(
        {**files, "transformer": foreign},
        "not look like the transformer of var: foreign keys .*another family",
    )


def test_files_in_each_others_role(files):
    swapped = {"tokenizer": files["transformer"], "transformer": files["tokenizer"]}
    refuses(swapped, "not look like the tokenizer of var: foreign keys .* it fits the role 'transformer'")


@pytest.mark.parametrize(
    "key", ["head.weight", "blocks.1.ffn.fc2.bias", "pos_1LC", "lvl_1L", "class_emb.weight"]
)
def test_missing_key_of_the_transformer(edited, key):
    refuses(edited("transformer", lambda weights: weights.pop(key)), key.replace(".", r"\."))


@pytest.mark.parametrize(
    "key", ["quantize.embedding.weight", "decoder.up.0.block.1.conv2.bias", "encoder.mid.attn_1.qkv.weight"]
)
def test_missing_key_of_the_tokenizer(edited, key):
    refuses(edited("tokenizer", lambda weights: weights.pop(key)), key.replace(".", r"\."))


def test_superfluous_key(edited):
    def add(weights):
        weights["blocks.0.ffn.fc3.weight"] = torch.ones(1)

    refuses(edited("transformer", add), r"foreign keys blocks\.0\.ffn\.fc3\.weight \(1 of")

    def add_block(weights):
        weights["blocks.7.ffn.fc1.weight"] = torch.ones(1)

    refuses(edited("transformer", add_block), r"superfluous blocks\.7\.ffn\.fc1\.weight")


@pytest.mark.parametrize(
    "key, shape",
    [
        ("blocks.1.attn.proj.weight", (48, 47)),
        ("blocks.1.attn.mat_qkv.weight", (143, 48)),
        ("blocks.1.attn.scale_mul_1H11", (1, 2, 1, 1)),
        ("pos_start", (1, 2, 48)),
        ("word_embed.weight", (48,)),
        ("lvl_1L", (55,)),
    ],
)
def test_misshapen_key(edited, key, shape):
    def reshape(weights):
        weights[key] = torch.zeros(shape, dtype=weights[key].dtype)

    refuses(edited("transformer", reshape), key.replace(".", r"\."))


def test_key_that_is_not_in_floating_point(edited):
    def quantize(weights):
        weights["head.weight"] = weights["head.weight"].to(torch.int8)

    refuses(edited("transformer", quantize), r"head\.weight .* has the dtype torch\.int8")


def test_index_of_scales_in_the_wrong_order(edited):
    def flip(weights):
        weights["lvl_1L"] = weights["lvl_1L"].flip(1)

    refuses(
        edited("transformer", flip), "lvl_1L of the transformer is not a list of scales in ascending order"
    )


@pytest.mark.parametrize(
    "role, name, value",
    [
        ("transformer", "patch_nums", [1, 2, 3, 4, 6]),
        ("transformer", "patch_nums", [1, 2, 3, 4]),
        ("tokenizer", "v_patch_nums", [1, 2, 3, 4, 6]),
        ("transformer", "depth", 3),
        ("transformer", "num_heads", 4),
        ("transformer", "embed_dim", 64),
        ("transformer", "mlp_ratio", 3.0),
        ("transformer", "shared_aln", True),
        ("transformer", "attn_l2_norm", False),
        ("transformer", "num_classes", 1000),
        ("tokenizer", "ch", 160),
        ("tokenizer", "vocab_size", 4096),
        ("tokenizer", "z_channels", 32),
        ("tokenizer", "quant_conv_ks", 1),
        ("tokenizer", "quant_resi", 0.0),
        ("tokenizer", "share_quant_resi", 1),
    ],
)
def test_arguments_that_contradict_the_weights(files, role, name, value):
    config = {"tokenizer": {"norm_num_groups": 4}, "transformer": {}}
    config[role][name] = value
    refuses(files, rf"original_config\['{role}'\] says {name}=.*, but the weights say", config)


def test_number_of_residual_convolutions_can_be_given():
    reference = golden("var", "d3_saln_l2_q0")
    files, given = reference.files("tokenizer"), reference.original_config()["tokenizer"]
    model = convert_original("var", files, {"tokenizer": {**given, "default_qresi_counts": 4}})
    assert model.config.num_residual_convs == 4
    refuses(
        files,
        "default_qresi_counts=3, but the weights say 4",
        {"tokenizer": {**given, "default_qresi_counts": 3}},
    )


def test_unknown_argument(files):
    refuses(
        files, r"unknown argument 'dept' \(did you mean 'depth'\?\)", {**GROUPS, "transformer": {"dept": 2}}
    )
    refuses(files, r"original_config\['transformer'\] must be a dict", {**GROUPS, "transformer": 2})


def test_group_count_that_cannot_be_known(files):
    refuses(files, "width 4 is not a multiple of norm_num_groups=32; give the number of groups", None)


def test_heads_that_cannot_be_known():
    reference = golden("var", "d2_adaln_nol2_q1")
    files = reference.files("tokenizer", "transformer")
    refuses(files, r"40 wide and has no learned scale .*\['num_heads'\]")
    refuses(files, "divisor of 40", {**GROUPS, "transformer": {"num_heads": 3}})


def test_scales_that_cannot_be_known(reference):
    files = reference.files("tokenizer")
    refuses(files, r"made for 5 scales, .*\['v_patch_nums'\]")
    config = convert_original(
        "var", files, {"tokenizer": {"norm_num_groups": 4, "v_patch_nums": [1, [2, 3]]}}
    ).config
    assert config.patch_nums == [1, [2, 3]]


def test_tokenizer_of_another_model(files):
    other = golden("var", "d2_adaln_nol2_q1").files("tokenizer")
    refuses({**files, **other}, "trained on 96 codes of 8 channels, but the tokenizer has 50 of 4")


def test_conversion_warns_about_nothing(reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.convert()
