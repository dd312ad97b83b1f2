"""The released checkpoints: their descriptions, and how they are fetched and converted."""

import json

import pytest
from huggingface_hub import HfApi

from hf_argen import VarForImageGeneration, convert_original
from hf_argen.modeling import conversion
from hf_argen.modeling.checkpoints import ConversionError
from hf_argen.modeling.conversion import load_presets

from .helpers.goldens import golden, states_equal
from .helpers.released import publish_tiny_preset, use_tiny_presets


@pytest.fixture(scope="module")
def reference():
    return golden("var", "d2_adaln_l2_q4")


@pytest.mark.parametrize(
    "package, family",
    [
        ("hf_argen.modeling.var", "var"),
        ("hf_argen.modeling.code", "code"),
        ("hf_argen.modeling.rar", "rar"),
        ("hf_argen.modeling.tokenizers.maskgit_vq", "maskgit-vq"),
        ("hf_argen.modeling.mar", "mar"),
        ("hf_argen.modeling.maskgit", "maskgit"),
        ("hf_argen.modeling.tokenizers.kl_vae", "kl-vae"),
        ("hf_argen.modeling.tokenizers.titok", "titok"),
    ],
)
def test_presets_are_complete(package, family):
    presets = load_presets(package)
    for name, preset in presets.items():
        assert name.startswith(f"{family}-")
        assert preset["files"].keys() == preset["original_config"].keys()
        assert preset.keys() >= {"description", "repository", "metric", "licence", "licence_note"}
        draws = preset["files"].keys() != {"tokenizer"}
        assert not draws or preset["generation_config"]["do_sample"] is True
    assert json.loads(json.dumps(presets)) == presets


@pytest.fixture
def released(hub, monkeypatch):
    """A Hub whose VAR repository holds the files of the reference case under the released names."""
    use_tiny_presets(monkeypatch.setattr)
    publish_tiny_preset(hub)
    return hub


@pytest.mark.parametrize(
    "source, variant",
    [("FoundationVision/var", "d16"), ("FoundationVision/var", "var-d16"), ("var-d16", None)],
)
def test_from_original_fetches_and_converts(released, reference, source, variant, caplog):
    HfApi().create_branch("FoundationVision/var", branch="other")
    model = VarForImageGeneration.from_original(source, variant=variant, revision="other")
    assert states_equal(model, reference.convert())
    for name in ("var_d16.pth", "vae_ch160v4096z32.pth"):
        assert released.requests("HEAD", f"FoundationVision/var/resolve/other/{name}")
    assert not released.requests("HEAD", "resolve/main")
    config = model.generation_config
    assert (config.guidance_scale, config.top_k, config.top_p, config.do_sample) == (1.5, 900, 0.96, True)
    assert "Licence of var-d16" in caplog.text


def test_from_original_reads_a_folder_of_the_released_files(released, reference, tmp_path):
    files = reference.files("tokenizer", "transformer")
    for role, name in (("transformer", "var_d16.pth"), ("tokenizer", "vae_ch160v4096z32.pth")):
        (tmp_path / name).symlink_to(files[role])
    assert states_equal(VarForImageGeneration.from_original(str(tmp_path), "d16"), reference.convert())
    assert not released.calls


def test_from_original_lists_what_there_is():
    for source, variant in (
        ("FoundationVision/var", None),
        ("FoundationVision/var", "d99"),
        ("someone/else", "d16"),
    ):
        with pytest.raises(
            ConversionError, match="they are FoundationVision/var d16, FoundationVision/var d20"
        ):
            VarForImageGeneration.from_original(source, variant)


def test_files_that_cannot_be_fetched(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no connection\ndetails")

    monkeypatch.setattr(conversion, "fetch_file", fail)
    with pytest.raises(ConversionError, match=r"FoundationVision/var cannot be fetched \(no connection\)"):
        convert_original("var", "var-d16")
