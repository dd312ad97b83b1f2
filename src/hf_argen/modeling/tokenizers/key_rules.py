"""Key rules of convolutional tokenizers in the naming of the latent diffusion repository, which many authors keep."""

from collections.abc import Callable

from ..key_map import Rename, Rule

AttentionRules = Callable[[str, str], list[Rule]]


def resnet(theirs: str, ours: str) -> list[Rule]:
    """A residual block."""
    parts = ("norm1", "conv1", "norm2", "conv2")
    kept = [Rename(f"{theirs}.{part}.{{leaf}}", f"{ours}.{part}.{{leaf}}") for part in parts]
    return [*kept, Rename(f"{theirs}.nin_shortcut.{{leaf}}", f"{ours}.shortcut.{{leaf}}")]


def attention(theirs: str, ours: str) -> list[Rule]:
    """Attention with a projection each for query, key and value."""
    parts = {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "proj"}
    return [Rename(f"{theirs}.{part}.{{leaf}}", f"{ours}.{own}.{{leaf}}") for part, own in parts.items()]


def coder(
    name: str, level: str, blocks: str, resampling: str, attention: AttentionRules = attention
) -> list[Rule]:
    """
    Encoder or decoder; both have the same parts.

    Args:
        name: of it, the authors' and ours.
        level: the authors' name of a level.
        blocks: ours.
        resampling: what stands between two levels.
        attention: the rules of an attention block.
    """
    theirs, ours = f"{name}.{level}.{{i}}", f"{name}.{blocks}.{{i}}"
    return [
        Rename(f"{name}.conv_in.{{leaf}}", f"{name}.conv_in.{{leaf}}"),
        *resnet(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}"),
        *attention(f"{theirs}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
        Rename(f"{theirs}.{resampling}.conv.{{leaf}}", f"{ours}.{resampling}.{{leaf}}"),
        *resnet(f"{name}.mid.block_1", f"{name}.mid_block.resnet_1"),
        *attention(f"{name}.mid.attn_1", f"{name}.mid_block.attention"),
        *resnet(f"{name}.mid.block_2", f"{name}.mid_block.resnet_2"),
        Rename(f"{name}.norm_out.{{leaf}}", f"{name}.norm_out.{{leaf}}"),
        Rename(f"{name}.conv_out.{{leaf}}", f"{name}.conv_out.{{leaf}}"),
    ]
