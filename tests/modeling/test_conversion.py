"""The conversion engine: key maps in both directions, reading files, what it refuses."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_argen import Decoding
from hf_argen.modeling.checkpoints import ConversionError, read_checkpoint, tensors_at
from hf_argen.modeling.code.convert_code import CONVERTER as CODE
from hf_argen.modeling.conversion import OriginalArguments, convert_weights, load_presets
from hf_argen.modeling.key_map import Drop, KeyMap, Rename, Reshape, Split
from hf_argen.modeling.tokenizers.multiscale_vq.convert_multiscale_vq import TOKENIZER
from hf_argen.modeling.var.convert_var import CONVERTER as VAR
from hf_argen.modeling.var.convert_var import TRANSFORMER

from ..helpers.goldens import golden
from ..helpers.released import released_state_dict

EXAMPLE = KeyMap(
    [
        Rename("blocks.{i}.proj.{leaf}", "layers.{i}.out.{leaf}"),
        Split("blocks.{i}.qkv", "layers.{i}.q", "layers.{i}.k", "layers.{i}.v"),
        Reshape("scale", "factor", ours=(-1,), theirs=(1, -1, 1)),
        Rename("shared.{leaf}", "convs.0.{leaf}"),
        Rename("convs.{i}.{leaf}", "convs.{i}.{leaf}"),
        Drop("mask"),
    ]
)


def example_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blocks.3.proj.weight": (2, 2),
        "blocks.3.qkv": (6, 2),
        "scale": (1, 4, 1),
        "convs.1.bias": (2,),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_key_map_names_and_shapes():
    theirs = example_weights()
    ours = EXAMPLE.under("model.").apply({**theirs, "mask": torch.ones(1)})
    assert {key: tuple(value.shape) for key, value in ours.items()} == {
        "model.layers.3.out.weight": (2, 2),
        "model.layers.3.q": (2, 2),
        "model.layers.3.k": (2, 2),
        "model.layers.3.v": (2, 2),
        "model.factor": (4,),
        "model.convs.1.bias": (2,),
    }
    assert torch.equal(ours["model.layers.3.k"], theirs["blocks.3.qkv"][2:4])
    assert EXAMPLE.under("model.").source_of("model.layers.3.v") == "blocks.3.qkv"


def test_key_map_reverts_what_it_applied():
    theirs = example_weights()
    back = EXAMPLE.revert(EXAMPLE.apply(theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_narrowed_key_map_reverts_to_the_names_of_the_checkpoint():
    ours = {"convs.0.weight": torch.ones(1)}
    assert list(EXAMPLE.revert(ours)) == ["shared.weight"]
    assert list(EXAMPLE.narrowed(["convs.0.weight"]).revert(ours)) == ["convs.0.weight"]


@pytest.mark.parametrize("key", ["blocks.x.qkv", "blocks.3.proj", "blocks.3.proj.weight.more", "other"])
def test_key_map_refuses_keys_that_no_rule_covers(key):
    assert EXAMPLE.unknown([key]) == [key]
    with pytest.raises(ConversionError, match=rf"{key} is covered by 0 rules"):
        EXAMPLE.apply({key: torch.ones(1)})


def test_key_map_refuses_a_key_that_two_rules_cover():
    ambiguous = KeyMap([Rename("a.{leaf}", "b.{leaf}"), Rename("a.weight", "c")])
    with pytest.raises(ConversionError, match=r"a\.weight is covered by 2 rules"):
        ambiguous.apply({"a.weight": torch.ones(1)})


@pytest.mark.parametrize("key, shape", [("blocks.0.qkv", (4, 2)), ("scale", (4,)), ("blocks.0.qkv", ())])
def test_key_map_names_the_key_of_an_impossible_shape(key, shape):
    with pytest.raises(ConversionError, match=f"{key} has the shape"):
        EXAMPLE.apply({key: torch.ones(shape)})


def test_revert_refuses_incomplete_parts_and_foreign_keys():
    with pytest.raises(ConversionError, match=r"layers\.0\.k, layers\.0\.v, which is missing"):
        EXAMPLE.revert({"layers.0.q": torch.ones(1)})
    with pytest.raises(ConversionError, match="No rule of the key map makes nothing"):
        EXAMPLE.revert({"nothing": torch.ones(1)})


CASES = ["d2_adaln_l2_q4", "d2_adaln_nol2_q1", "d3_saln_l2_q0"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "role, key_map, dropped", [("transformer", TRANSFORMER, 3), ("tokenizer", TOKENIZER, 0)]
)
def test_checkpoint_survives_the_round_trip_bit_by_bit(case, role, key_map, dropped):
    file = golden("var", case).files(role)[role]
    theirs = torch.load(file, weights_only=True)
    back = key_map.narrowed(theirs).revert(key_map.apply(theirs))
    kept = {key for key in theirs if not key.endswith(("lvl_1L", "attn_bias_for_masking", "zero_k_bias"))}
    assert back.keys() == kept
    assert bool(dropped) == (len(kept) < len(theirs))
    assert all(back[key].dtype == theirs[key].dtype and torch.equal(back[key], theirs[key]) for key in kept)


@pytest.mark.parametrize("case", CASES)
def test_converted_model_holds_the_numbers_of_the_files(case):
    reference = golden("var", case)
    model = reference.convert()
    ours = model.state_dict()
    for role, key_map in (("transformer", TRANSFORMER), ("tokenizer", TOKENIZER.under("image_tokenizer."))):
        theirs = torch.load(reference.files(role)[role], weights_only=True)
        for key, tensor in key_map.apply(theirs).items():
            assert torch.equal(ours.pop(key), tensor), key
    assert not ours


VAE = "vae_ch160v4096z32.pth"
SIDES_256 = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
SIDES_512 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]


def released(family: str, name: str) -> dict[str, torch.Tensor]:
    """A released state dict; only the index of scales, which conversion reads, has numbers."""
    weights = released_state_dict(family, name)
    if "lvl_1L" in weights:
        sides = SIDES_256 if weights["lvl_1L"].shape[1] == 680 else SIDES_512
        weights["lvl_1L"] = torch.cat([torch.full((n * n,), i) for i, n in enumerate(sides)])[None]
    return weights


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_released_var_files_convert_without_original_config(depth):
    name = "var_d36.pth (512 px, shared AdaLN)" if depth == 36 else f"var_d{depth}.pth"
    weights = {"transformer": released("var", name), "tokenizer": released("var", VAE)}
    config = convert_weights(VAR, weights, {}).config
    assert config.hidden_size == 64 * depth
    assert config.num_hidden_layers == config.num_attention_heads == depth
    assert config.intermediate_size == 256 * depth
    assert config.num_classes == 1000 and config.vocab_size == 4096 and config.codebook_dim == 32
    assert config.use_qk_norm and config.shared_adaln == (depth == 36)
    assert config.patch_nums == (SIDES_512 if depth == 36 else SIDES_256)
    assert config.condition_dropout == 0.1 and config.layer_norm_eps == 1e-6
    tokenizer = config.image_tokenizer_config
    assert tokenizer.patch_nums == config.patch_nums
    assert tokenizer.base_channels == 160 and tokenizer.channel_multiplier == [1, 1, 2, 2, 4]
    assert tokenizer.num_res_blocks == 2 and tokenizer.norm_num_groups == 32
    assert tokenizer.num_residual_convs == 4 and tokenizer.residual_conv_ratio == 0.5
    assert tokenizer.quant_conv_kernel_size == 3 and tokenizer.attention_at_lowest


def test_released_tokenizer_alone():
    model = convert_weights(VAR, {"tokenizer": released("var", VAE)}, {})
    assert type(model).__name__ == "MultiScaleVQModel"
    assert model.config.patch_nums == SIDES_256
    assert sum(parameter.numel() for parameter in model.parameters()) == 108_948_355


def test_released_code_files_convert_without_original_config():
    weights = {
        "tokenizer": released("code", VAE),
        "drafter": released("code", "drafter_*.pth (depth 30)"),
        "refiner": released("code", "refiner_*.pth (depth 16)"),
    }
    model = convert_weights(CODE, weights, {})
    assert model.config.num_hidden_layers == 30 and model.config.refiner_config.num_hidden_layers == 16
    assert model.refiner.image_tokenizer is None
    expected = 108_948_355 + 2_010_020_356 + 310_283_520
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


PRESETS = [
    (converter, name, preset)
    for converter, package in ((VAR, "hf_argen.modeling.var"), (CODE, "hf_argen.modeling.code"))
    for name, preset in load_presets(package).items()
]


@pytest.mark.parametrize("converter, name, preset", PRESETS, ids=[name for _, name, _ in PRESETS])
def test_presets_agree_with_the_released_shapes(converter, name, preset):
    """The arguments that a preset brings are checked against the weights, and build a model that they fill."""
    weights = {}
    for role, file in preset["files"].items():
        kind, _, rest = file["file"].partition("_")
        listed = {"drafter": "drafter_*.pth (depth 30)", "refiner": "refiner_*.pth (depth 16)"}.get(kind)
        if rest == "d36.pth":
            listed = "var_d36.pth (512 px, shared AdaLN)"
        weights[role] = released("code" if kind in ("drafter", "refiner") else "var", listed or file["file"])
    model = convert_weights(converter, weights, preset["original_config"])
    assert all(weight.device.type == "meta" for weight in model.parameters())
    if converter is CODE:
        decoding = Decoding.from_dict(preset["generation_config"]["decoding"])
        assert decoding.draft_scales in range(6, 10)
        assert len(decoding.top_k) == len(decoding.temperature) == len(model.config.patch_nums)


def test_arguments_are_checked_against_the_weights():
    given = OriginalArguments("transformer", {"depth": 2, "patch_nums": (1, 2), "norm_eps": 1e-5})
    assert given.agree("patch_nums", [1, 2]) == [1, 2]
    assert given.get("norm_eps", 1e-6) == 1e-5
    with pytest.raises(ConversionError, match=r"\['transformer'\] says depth=2, but the weights say 3"):
        given.agree("depth", 3)


def test_unknown_arguments_are_refused_with_the_closest_name():
    given = OriginalArguments("tokenizer", {"v_patchnums": [1]})
    given.get("v_patch_nums")
    given.ignore("test_mode")
    with pytest.raises(ConversionError, match=r"'v_patchnums' \(did you mean 'v_patch_nums'\?\)"):
        given.finish()


# Reading files

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


def assert_reads(path: Path):
    content = read_checkpoint(path, "transformer")
    assert content.keys() == WEIGHTS.keys()
    assert all(torch.equal(content[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("is_archive", [True, False])
def test_reads_torch_files(tmp_path, is_archive):
    torch.save(WEIGHTS, tmp_path / "w.pth", _use_new_zipfile_serialization=is_archive)
    assert_reads(tmp_path / "w.pth")


def test_reads_safetensors_files_and_folders(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_reads(tmp_path / "model.safetensors")
    assert_reads(tmp_path)


def sharded(folder: Path) -> Path:
    for number, key in enumerate(WEIGHTS):
        save_file({key: WEIGHTS[key]}, folder / f"model-{number}.safetensors")
    weight_map = {key: f"model-{number}.safetensors" for number, key in enumerate(WEIGHTS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_reads_sharded_safetensors(tmp_path):
    assert_reads(sharded(tmp_path))


def test_sharded_folder_with_a_missing_shard_or_a_damaged_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(
        ConversionError, match=r"model-1\.safetensors' does not exist, but the index names it"
    ):
        read_checkpoint(tmp_path, "transformer")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConversionError, match=r"index .* of the transformer is damaged"):
        read_checkpoint(tmp_path, "transformer")


def test_folder_without_weights(tmp_path):
    with pytest.raises(ConversionError, match="0 safetensors indexes and 0 safetensors files"):
        read_checkpoint(tmp_path, "transformer")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_truncated_files(tmp_path):
    for is_archive in (True, False):
        torch.save(WEIGHTS, tmp_path / "w.pth", _use_new_zipfile_serialization=is_archive)
        truncate(tmp_path / "w.pth")
        with pytest.raises(ConversionError, match=r"transformer file '.*w\.pth' is (truncated|damaged)"):
            read_checkpoint(tmp_path / "w.pth", "transformer")
    save_file({"a": torch.zeros(100)}, tmp_path / "w.safetensors")
    truncate(tmp_path / "w.safetensors")
    with pytest.raises(ConversionError, match="truncated or not a safetensors file"):
        read_checkpoint(tmp_path / "w.safetensors", "transformer")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ConversionError, match="is empty; fetch it again"):
        read_checkpoint(tmp_path / "empty.pth", "transformer")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"PK-but-no-archive", bytes(range(256)) * 4])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=r"'.*w\.pth' is (not a checkpoint|damaged|truncated)"):
        read_checkpoint(tmp_path / "w.pth", "transformer")


class RunsWhenUnpickled:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, writer):
    content = {**WEIGHTS, "args": RunsWhenUnpickled(tmp_path / "was_run")}
    if writer == "pickle":
        (tmp_path / "w.pth").write_bytes(pickle.dumps({"args": content["args"]}, protocol=2))
    else:
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ConversionError, match=r"holds code \(\w+\.system\), and nothing of it was run"):
        read_checkpoint(tmp_path / "w.pth", "transformer")
    assert not (tmp_path / "was_run").exists()


def test_other_classes_need_the_written_allow_list(tmp_path):
    torch.save({"args": argparse.Namespace(depth=2)}, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match=r"holds code \(argparse\.Namespace\)"):
        read_checkpoint(tmp_path / "w.pth", "transformer")
    assert read_checkpoint(tmp_path / "w.pth", "trainer", [argparse.Namespace])["args"].depth == 2


def test_missing_file(tmp_path):
    with pytest.raises(ConversionError, match=r"tokenizer file '.*vae\.pth' does not exist"):
        read_checkpoint(tmp_path / "vae.pth", "tokenizer")


def test_content_that_is_not_a_dict_of_tensors(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    with pytest.raises(ConversionError, match="holds a list, not a dict of tensors"):
        read_checkpoint(tmp_path / "w.pth", "transformer")
    with pytest.raises(ConversionError, match="not a plain dict of tensors; its entries are model, step"):
        tensors_at({"model": {}, "step": 3}, (), "transformer", "w.pth")
    with pytest.raises(ConversionError, match="not a plain dict of tensors; it is empty"):
        tensors_at({}, (), "transformer", "w.pth")
    with pytest.raises(ConversionError, match=r"no entry trainer -> vae_local; its entries are var_wo_ddp"):
        tensors_at({"trainer": {"var_wo_ddp": {}}}, ("trainer", "vae_local"), "trainer", "w.pth")
    with pytest.raises(ConversionError, match="there is a int in that place"):
        tensors_at({"trainer": 1}, ("trainer", "vae_local"), "trainer", "w.pth")
