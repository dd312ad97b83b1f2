"""The one table of families, their registration with transformers, and our own Auto classes."""

import importlib
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from .assets import default_model, no_class_model
from .generation import _compat
from .generation.stored import offer_lazily
from .processors.class_names import NUM_IMAGENET_CLASSES, imagenet_class_names


@dataclass(frozen=True)
class Family:
    """
    Where the parts of a family are. Classes are dotted names below `package`, imported when they are asked
    for.

    Attributes:
        name: the `model_type` of its configuration.
        package: the folder, with `convert_<name>.py` and, where checkpoints were released, `presets.json`.
        title: what it is, in a few words.
        config: configuration class.
        base_model: what `AutoModel` gives.
        generator: what `AutoModelForImageGeneration` gives; `None` for a visual tokenizer.
        processor: what `AutoProcessor` gives, its whole dotted name, since families share processors.
        picture_processor: of a visual tokenizer, the processor of the family that it was made for, its whole dotted
            name; it brings pictures to their size as the authors do.
        generated_by: of a visual tokenizer, the name of the family of the generators that its authors released under the
            same name; `convert_original` converts their files, too.
    """

    name: str
    package: str
    title: str
    config: str
    base_model: str
    generator: str | None = None
    processor: str | None = None
    picture_processor: str | None = None
    generated_by: str | None = None

    def load(self, class_name: str) -> Any:
        """The class behind one of the dotted names."""
        return imported(f"{self.package}.{class_name}")


def imported(name: str) -> Any:
    """The object behind a dotted name."""
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="multiscale_vq",
            package="hf_argen.modeling.tokenizers.multiscale_vq",
            title="multi-scale residual VQ-VAE, the visual tokenizer of VAR",
            config="configuration_multiscale_vq.MultiScaleVQConfig",
            base_model="modeling_multiscale_vq.MultiScaleVQModel",
            picture_processor="hf_argen.processors.processing_var.VarProcessor",
        ),
        Family(
            name="var",
            package="hf_argen.modeling.var",
            title="VAR, next-scale prediction (arXiv 2404.02905)",
            config="configuration_var.VarConfig",
            base_model="modeling_var.VarModel",
            generator="modeling_var.VarForImageGeneration",
            processor="hf_argen.processors.processing_var.VarProcessor",
        ),
        Family(
            name="code",
            package="hf_argen.modeling.code",
            title="CoDe, a large and a small VAR together (arXiv 2411.17787)",
            config="configuration_code.CodeConfig",
            base_model="modeling_code.CodeForImageGeneration",
            generator="modeling_code.CodeForImageGeneration",
            processor="hf_argen.processors.processing_var.VarProcessor",
        ),
        Family(
            name="llamagen_vq",
            package="hf_argen.modeling.tokenizers.llamagen_vq",
            title="VQ-16 and VQ-8, the visual tokenizers of LlamaGen",
            config="configuration_llamagen_vq.LlamaGenVQConfig",
            base_model="modeling_llamagen_vq.LlamaGenVQModel",
            picture_processor="hf_argen.processors.processing_llamagen.LlamaGenProcessor",
        ),
        Family(
            name="llamagen",
            package="hf_argen.modeling.llamagen",
            title="LlamaGen, next-token prediction (arXiv 2406.06525)",
            config="configuration_llamagen.LlamaGenConfig",
            base_model="modeling_llamagen.LlamaGenModel",
            generator="modeling_llamagen.LlamaGenForImageGeneration",
            processor="hf_argen.processors.processing_llamagen.LlamaGenProcessor",
        ),
        Family(
            name="maskgit_vq",
            package="hf_argen.modeling.tokenizers.maskgit_vq",
            title="MaskGIT-VQGAN, the visual tokenizer of RAR",
            config="configuration_maskgit_vq.MaskGitVQConfig",
            base_model="modeling_maskgit_vq.MaskGitVQModel",
            picture_processor="hf_argen.processors.processing_rar.RarProcessor",
        ),
        Family(
            name="rar",
            package="hf_argen.modeling.rar",
            title="RAR, next-token prediction trained on permuted orders (arXiv 2411.00776)",
            config="configuration_rar.RarConfig",
            base_model="modeling_rar.RarModel",
            generator="modeling_rar.RarForImageGeneration",
            processor="hf_argen.processors.processing_rar.RarProcessor",
        ),
        Family(
            name="kl_vae",
            package="hf_argen.modeling.tokenizers.kl_vae",
            title="KL-16, the autoencoder of MAR and the families after it (arXiv 2112.10752)",
            config="configuration_kl_vae.KlVaeConfig",
            base_model="modeling_kl_vae.KlVaeModel",
            picture_processor="hf_argen.processors.processing_llamagen.LlamaGenProcessor",
        ),
        Family(
            name="titok",
            package="hf_argen.modeling.tokenizers.titok",
            title="TiTok, visual tokenizers of a few tokens in one row (arXiv 2406.07550)",
            config="configuration_titok.TitokConfig",
            base_model="modeling_titok.TitokModel",
            generated_by="maskgit",
            picture_processor="hf_argen.processors.processing_rar.RarProcessor",
        ),
        Family(
            name="maskgit",
            package="hf_argen.modeling.maskgit",
            title="MaskGIT, masked generation of ids, and TiTok's generators (arXiv 2202.04200, arXiv 2406.07550)",
            config="configuration_maskgit.MaskGitConfig",
            base_model="modeling_maskgit.MaskGitModel",
            generator="modeling_maskgit.MaskGitForImageGeneration",
            processor="hf_argen.processors.processing_rar.RarProcessor",
        ),
        Family(
            name="mar",
            package="hf_argen.modeling.mar",
            title="MAR, masked generation of continuous tokens (arXiv 2406.11838)",
            config="configuration_mar.MarConfig",
            base_model="modeling_mar.MarModel",
            generator="modeling_mar.MarForImageGeneration",
            processor="hf_argen.processors.processing_llamagen.LlamaGenProcessor",
        ),
    )
}


# Networks that draft: model type -> configuration and network, name and class of the part
# of speculative decoding that drives them; dotted names.
DRAFTERS = {
    "medusa_heads": (
        *("configuration_medusa.MedusaHeadsConfig", "modeling_medusa.MedusaHeads"),
        *("medusa_drafter", "drafting.MedusaDrafter"),
    ),
    "eagle": (
        *("configuration_eagle.EagleConfig", "modeling_eagle.Eagle"),
        *("eagle_drafter", "drafting.EagleDrafter"),
    ),
}

# Task -> dotted name of its pipeline and what it takes, as transformers sorts tasks.
PIPELINES = {
    "text-to-image": ("hf_argen.pipelines.text_to_image.TextToImagePipeline", "text"),
    "class-to-image": ("hf_argen.pipelines.class_to_image.ClassToImagePipeline", "text"),
    "image-inpainting": ("hf_argen.pipelines.image_inpainting.ImageInpaintingPipeline", "multimodal"),
}


def register_with_transformers() -> None:
    """
    Makes the Auto classes and `pipeline()` of transformers know every family and task; imports configurations, but
    no model.
    """
    for family in FAMILIES.values():
        config_class = family.load(family.config)
        AutoConfig.register(family.name, config_class, exist_ok=True)
        _compat.register_lazily(AutoModel, config_class, f"{family.package}.{family.base_model}")
        if family.processor is not None:
            _compat.register_lazily(AutoProcessor, config_class, family.processor)
    package = "hf_argen.modeling.drafters"
    for name, (config_name, network, drafter, drafter_class) in DRAFTERS.items():
        config_class = imported(f"{package}.{config_name}")
        AutoConfig.register(name, config_class, exist_ok=True)
        _compat.register_lazily(AutoModel, config_class, f"{package}.{network}")
        offer_lazily("drafter", drafter, f"{package}.{drafter_class}")
    for task, (class_name, input_type) in PIPELINES.items():
        default = no_class_model if task == "class-to-image" else default_model
        _compat.register_pipeline(task, class_name, AutoModelForImageGeneration, input_type, default)


def new_processor(config: PreTrainedConfig) -> ProcessorMixin | None:
    """
    The processor of a converted model; `None` for a visual tokenizer. Published checkpoints of 1000 classes are
    trained on ImageNet, so such a model gets its class names.
    """
    family = FAMILIES[config.model_type]
    if family.processor is None:
        return None
    image_size = getattr(config, "image_size", None)
    if image_size is None:
        factor = getattr(
            config.image_tokenizer_config, "downsampling_factor", 16
        )  # 16 where it is not part of the model
        factor *= getattr(config, "patch_size", 1)  # of latents to a token
        image_size = [side * factor for side in config.grid_sizes[-1]]
    classes = None
    if config.condition_type == "class" and config.num_classes == NUM_IMAGENET_CLASSES:
        classes = imagenet_class_names()
    return imported(family.processor)(image_size=image_size, class_names=classes)


class AutoModelForImageGeneration:
    """
    The image generator that a configuration describes.

    >>> model = AutoModelForImageGeneration.from_pretrained("folder-or-repository")
    """

    def __init__(self) -> None:
        raise TypeError(
            "Make a model with AutoModelForImageGeneration.from_pretrained(...) or .from_config(...)."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModel:
        """
        Loads a saved model, without a name the one that ships with the package; takes what
        `PreTrainedModel.from_pretrained` takes, `strict` included.

        Raises:
            ValueError: the folder or repository holds no image generator of ours, or its weights do not fit.
        """
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = default_model()
        from .modeling.loading import check_folder

        kwargs.pop("code_revision", None)  # pipeline() passes it on; no family of ours loads code
        check_folder(pretrained_model_name_or_path, kwargs.get("variant"), kwargs.get("subfolder", ""))
        config = kwargs.pop("config", None)
        if config is None:
            hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        model_class = cls._model_class(config)
        return model_class.from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """An untrained model for `config`; takes `dtype` and `attn_implementation`."""
        return _compat.from_config(cls._model_class(config), config, **kwargs)

    @staticmethod
    def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        family = FAMILIES.get(config.model_type)
        if family is None or family.generator is None:
            known = ", ".join(name for name, family in FAMILIES.items() if family.generator is not None)
            raise ValueError(
                f"The model type {config.model_type!r} is no image generator of hf_argen; they are {known}."
            )
        return family.load(family.generator)
