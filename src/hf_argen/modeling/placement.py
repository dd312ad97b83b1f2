"""How the weights of our models are held: quantized by bitsandbytes, or divided among processes."""

import copy
import logging
from typing import Any, Self

import torch
from torch import nn
from transformers.quantizers import AutoQuantizationConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
BLOCK = 64  # weights that share a scale in 4 bits
MULTIPLICATIONS = "bitsandbytes.autograd._functions"


class PlacementMixin:
    """Adds to `from_pretrained` what quantization and tensor parallelism need."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Self | tuple[Self, dict]:
        """
        As the strict one, and:

        - with `quantization_config`, what is not quantized is held in bfloat16 unless `dtype` says otherwise, and
          4-bit layers compute in that type unless `bnb_4bit_compute_dtype` names another than its default, float32.
          The modules in `_keep_in_fp32_modules` are not quantized, and to 4 bits none of which a row is no whole
          number of blocks;
        - with `distributed_config`, attention heads are divided among the processes.

        Raises:
            ValueError: the processes cannot divide the heads evenly.
        """
        options = quantized(kwargs)
        quantization = options.get("quantization_config")
        if getattr(quantization, "load_in_4bit", False):
            narrow = narrow_layers(cls, pretrained_model_name_or_path, options)
            quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or ()), *narrow]
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settle(model)
        check_heads(model)
        return loaded


def quantized(options: dict[str, Any]) -> dict[str, Any]:
    """
    Keywords of `from_pretrained`, with our defaults where they ask for a quantized model: transformers would hold the
    rest in float32 and compute in it, at twice the memory and time.
    """
    quantization = options.get("quantization_config")
    if quantization is None:
        return options
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    options = {**options, "quantization_config": copy.deepcopy(quantization)}
    given = options.pop("torch_dtype", None)
    dtype = options["dtype"] = options.get("dtype") or given or torch.bfloat16
    in_4bit = getattr(quantization, "load_in_4bit", False) and isinstance(dtype, torch.dtype)
    if in_4bit and quantization.bnb_4bit_compute_dtype == torch.float32:
        options["quantization_config"].bnb_4bit_compute_dtype = dtype
    return options


def narrow_layers(model_class: Any, source: Any, options: dict[str, Any]) -> list[str]:
    """
    The linear layers whose rows are no whole number of blocks, by name. Blocks then run over the ends of rows, and on a
    CPU bitsandbytes (0.50) unpacks them to other weights. These layers are small: the input projection of a model.
    """
    try:
        config = options.get("config") or model_class.config_class.from_pretrained(
            source, **{name: options[name] for name in HUB_OPTIONS if name in options}
        )
        with torch.device("meta"):
            model = model_class(config)
    except (OSError, ValueError):
        return []  # loading will say what is wrong
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % BLOCK
    ]


def settle(model: nn.Module) -> None:
    """
    Brings a quantized model into a state in which it can be used and saved in any order.

    On CPUs with bfloat16 instructions bitsandbytes (0.50) repacks 4-bit weights at their first use, with scales
    rounded to bfloat16. What is saved afterwards is another model, or without double quantization a broken one. Its
    plain path, which unpacks the weights at every use, does not. It also logs a line at every 8-bit multiplication;
    one says as much.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logger = logging.getLogger(MULTIPLICATIONS)
    if not any(isinstance(one, _Once) for one in logger.filters):
        logger.addFilter(_Once())


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def check_heads(model: nn.Module) -> None:
    """
    Refuses a model whose attention heads the processes of tensor parallelism cannot divide evenly.

    Raises:
        ValueError: see there.
    """
    processes = getattr(model, "_tp_size", None) or 1
    for module in model.modules() if processes > 1 else ():
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if heads is not None and heads % processes and getattr(module, "tp_plan", None):
            raise ValueError(
                f"{type(module).__name__} has {heads} attention heads, which {processes} processes of tensor "
                f"parallelism cannot divide; start a number of processes that divides {heads}."
            )
